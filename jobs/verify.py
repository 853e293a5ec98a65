"""Compares the engine with transformers' model on real images: `cvt-label verify`.

Benchmarks use its models, images and reference too. Measuring speed belongs to `jobs.benchmarks`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cvt.runtimes import Device, precisions_of
from jobs.console import Exit, RuntimesOption, err, exit_status, out, precisions_option, run_alone

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from cvt.checkpoints import Checkpoint
    from cvt.preprocessing import Preprocessor

#: Limit for images that are decoded here; no image is refused for its size.
MAX_PIXELS = 10**9

#: Minimum fraction of images with the same top class, and maximum difference of a logit, by precision.
GOALS = {"fp32": (1.0, 1e-4), "bf16": (0.995, float("inf")), "fp16": (0.995, float("inf"))}


@dataclass(frozen=True)
class Agreement:
    """How the engine's logits compare to those of transformers' float32 model.

    Attributes:
        runtime: the engine's.
        precision: the engine's.
        images: number of images.
        top1: fraction of images with the same top class.
        difference: maximum difference of a logit.
    """

    runtime: str
    precision: str
    images: int
    top1: float
    difference: float

    @classmethod
    def of(cls, runtime: str, precision: str, found: np.ndarray, wanted: np.ndarray) -> Agreement:
        """Compares logits, both (n, classes)."""
        import numpy as np

        top1 = float((found.argmax(1) == wanted.argmax(1)).mean())
        return cls(runtime, precision, len(wanted), top1, float(np.abs(found - wanted).max()))

    @property
    def is_reached(self) -> bool:
        """Whether the engine meets `GOALS`."""
        top1, difference = GOALS[self.precision]
        return self.top1 >= top1 and self.difference <= difference


def load_model(model: str, size: int | None) -> Checkpoint:
    """Loads a checkpoint as `model.path` does, or makes a published variant with random weights.

    Args:
        model: a name of `PRESETS`, or what `model.path` takes.
        size: of a variant's images, in pixels (224).

    Raises:
        ConfigError: a size is given for a checkpoint, which has its own.
        CheckpointError, StorageError: the checkpoint cannot be loaded.
    """
    import torch

    from cvt.checkpoints import Checkpoint
    from cvt.modeling import CvtForImageClassification
    from cvt.presets import PRESETS, preset_config, preset_preprocessor
    from pipeline.classify.checkpoint import open_checkpoint
    from pipeline.config import ConfigError
    from pipeline.storage import Storage

    if model in PRESETS:
        torch.manual_seed(0)
        labels = {i: f"class {i}" for i in range(1000)}
        network = CvtForImageClassification(preset_config(model, id2label=labels)).eval()
        return Checkpoint(model, network, preset_preprocessor(size or 224), digest="")
    if size is not None:
        raise ConfigError(f"--size: is for {', '.join(PRESETS)}; {model} has a size of its own")
    return open_checkpoint(Storage(), model)


def read_images(uri: str, preprocessor: Preprocessor | None = None) -> Iterator[bytes]:
    """Yields the encoded images of shards in order; with a preprocessor, only those that can be decoded."""
    from pipeline.config import InputConfig
    from pipeline.decode import decode
    from pipeline.read import ReadOptions, input_shards, read_samples
    from pipeline.storage import Storage

    section, storage = InputConfig(uri=uri, labels=False), Storage()
    for shard in input_shards(storage, section):
        for sample in read_samples(storage, shard, ReadOptions.of(section, [])):
            data = sample.image
            if data and (not preprocessor or decode(data, preprocessor, MAX_PIXELS).pixels is not None):
                yield data


def load_images(uri: str, preprocessor: Preprocessor, count: int) -> np.ndarray:
    """Returns the first images that can be decoded, at most `count`: uint8 (n, size, size, 3).

    Raises:
        StorageError, NoShardsError: the images cannot be read, or there are none.
    """
    import numpy as np

    from pipeline.decode import decode
    from pipeline.read import NoShardsError

    decoded = (decode(data, preprocessor, MAX_PIXELS).pixels for data in read_images(uri))
    found = list(itertools.islice((pixels for pixels in decoded if pixels is not None), count))
    if not found:
        raise NoShardsError(f"{uri}: no image that can be decoded")
    return np.stack(found)


def to_transformers(checkpoint: Checkpoint) -> Any:
    """Returns transformers' own model with a copy of the weights."""
    import transformers

    config = transformers.CvtConfig(**checkpoint.model.config.to_dict())
    theirs = transformers.CvtForImageClassification(config)
    theirs.load_state_dict(checkpoint.model.state_dict())
    return theirs.eval()


def normalize(images: np.ndarray, preprocessor: Preprocessor, device: str = "cpu") -> Tensor:
    """Returns images as transformers' model takes them: float32 (n, 3, size, size) on a device."""
    import torch

    mean, std = (
        torch.tensor(values, device=device).view(-1, 1, 1) for values in (preprocessor.mean, preprocessor.std)
    )
    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
    return (pixels * preprocessor.rescale_factor - mean) / std


def in_batches(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Cuts images into batches."""
    return (images[start : start + size] for start in range(0, len(images), size))


def transformers_classifier(
    checkpoint: Checkpoint,
    device: str = "cpu",
    precision: str = "fp32",
    batch_size: int = 16,
    compiled: bool = False,
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns transformers' model as a function of images, uint8 (n, size, size, 3), that returns logits."""
    import torch

    from cvt.inference.engine import PRECISIONS

    dtype = PRECISIONS[precision]
    model = to_transformers(checkpoint).to(device, dtype)
    forward = torch.compile(model, dynamic=False) if compiled else model

    @torch.inference_mode()
    def classify(images: np.ndarray) -> np.ndarray:
        batches = (
            normalize(each, checkpoint.preprocessor, device) for each in in_batches(images, batch_size)
        )
        logits: np.ndarray = torch.cat(
            [forward(each.to(dtype)).logits.float().cpu() for each in batches]
        ).numpy()
        return logits

    return classify


def verify(
    images: Annotated[str, typer.Option("--images", help="Shards with images: a folder or a URI.")],
    model: Annotated[
        str, typer.Option("--model", help="cvt-13, cvt-21 or cvt-w24 (random weights), or as model.path.")
    ] = "fashion-mnist",
    size: Annotated[int | None, typer.Option(min=32, help="Pixels, with random weights (224).")] = None,
    precision: Annotated[list[str] | None, precisions_option("what the runtime has")] = None,
    runtime: RuntimesOption = None,
    device: Annotated[Device, typer.Option("--device")] = "auto",
    count: Annotated[int, typer.Option(min=1, help="Maximum number of images.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
) -> None:
    """Compare the engine with transformers' model in float32, on the same pixels.

    The goal for fp32 is the same top class for all images, and logits within 1e-4; for bf16 and fp16, the
    same top class for 99.5 % of the images.

    Exit status: 0; 1 when an engine misses its goal; 2 when runtime, precision or device can't be used here;
    4 when model or images can't be used.
    """
    with exit_status():
        from cvt.inference import Engine
        from pipeline.config import ConfigError

        checkpoint = load_model(model, size)
        network, preprocessor = checkpoint.model, checkpoint.preprocessor
        pixels = load_images(images, preprocessor, count)
        try:
            engines = [
                Engine(network, preprocessor, device=device, precision=p, runtime=r, batch_size=batch_size)
                for r in runtime or ["torch"]
                for p in precision or precisions_of(r)
            ]
        except (ValueError, ImportError) as error:
            raise ConfigError(str(error)) from None
    err.print(f"{len(pixels):,} images; transformers' model first", highlight=False)
    wanted = transformers_classifier(checkpoint)(pixels)
    found = []
    for engine in engines:
        err.print(f"engine, {engine.runtime}, {engine.precision}", highlight=False)
        found.append(Agreement.of(engine.runtime, engine.precision, engine(pixels).logits, wanted))
    _print(found)
    sys.exit(Exit.OK if all(agreement.is_reached for agreement in found) else Exit.FAILED)


def _print(agreements: list[Agreement]) -> None:
    table = Table("runtime", "precision", "images", "same top class", "largest logit difference", "reached")
    for a in agreements:
        cells = (a.runtime, a.precision, f"{a.images:,}", f"{a.top1:.2%}", f"{a.difference:.2g}")
        table.add_row(*cells, "yes" if a.is_reached else "no")
    out.print(table)


if __name__ == "__main__":
    run_alone(verify)
