"""Models and images that `verify` and the benchmarks use, and transformers' model as the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
import transformers

from cvt.checkpoints import Checkpoint
from cvt.inference.engine import PRECISIONS
from cvt.modeling import CvtForImageClassification
from cvt.preprocessing import Preprocessor
from cvt.presets import PRESETS, preset_config, preset_preprocessor
from pipeline.classify.checkpoint import open_checkpoint
from pipeline.config import ConfigError, InputConfig
from pipeline.decode import decode
from pipeline.read import NoShardsError, ReadOptions, list_input_shards, read_samples
from pipeline.storage import Storage

#: Limit for images that are decoded here; no image is refused for its size.
MAX_PIXELS = 10**9


def load_model(model: str, size: int | None) -> Checkpoint:
    """Loads a checkpoint as `model.path` does, or makes a published variant with random weights.

    Args:
        model: a name of `PRESETS`, or what `model.path` takes.
        size: of a variant's images, in pixels (224).

    Raises:
        ConfigError: a size is given for a checkpoint, which has its own.
        CheckpointError, StorageError: the checkpoint cannot be loaded.
    """
    if model in PRESETS:
        torch.manual_seed(0)
        labels = {i: f"class {i}" for i in range(1000)}
        network = CvtForImageClassification(preset_config(model, id2label=labels)).eval()
        return Checkpoint(model, network, preset_preprocessor(size or 224), digest="")
    if size is not None:
        raise ConfigError(f"--size: is for {', '.join(PRESETS)}; {model} has a size of its own")
    return open_checkpoint(Storage(), model)


def read_images(uri: str, preprocessor: Preprocessor) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yields the images of shards that can be decoded, in order: encoded, and as uint8 (size, size, 3).

    Raises:
        StorageError, NoShardsError: the images cannot be read, or there are none.
    """
    section, storage, found = InputConfig(uri=uri, labels=False), Storage(), False
    for shard in list_input_shards(storage, section):
        for sample in read_samples(storage, shard, ReadOptions.from_config(section, [])):
            if sample.image and (pixels := decode(sample.image, preprocessor, MAX_PIXELS).pixels) is not None:
                found = True
                yield sample.image, pixels
    if not found:
        raise NoShardsError(f"{uri}: no image that can be decoded")


def load_images(uri: str, preprocessor: Preprocessor, count: int) -> np.ndarray:
    """Returns the first images that can be decoded, at most `count`: uint8 (n, size, size, 3).

    Raises:
        StorageError, NoShardsError: as `read_images`.
    """
    return np.stack([pixels for _, pixels in itertools.islice(read_images(uri, preprocessor), count)])


def transformers_classifier(
    checkpoint: Checkpoint,
    device: str = "cpu",
    precision: str = "fp32",
    batch_size: int = 16,
    compiled: bool = False,
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns transformers' model as a function of images, uint8 (n, size, size, 3), that returns logits."""
    dtype, preprocessor = PRECISIONS[precision], checkpoint.preprocessor
    model = transformers.CvtForImageClassification(
        transformers.CvtConfig(**checkpoint.model.config.to_dict())
    )
    model.load_state_dict(checkpoint.model.state_dict())
    model = model.to(device, dtype).eval()
    forward = torch.compile(model, dynamic=False) if compiled else model
    mean, std = (torch.tensor(each, device=device) for each in (preprocessor.mean, preprocessor.std))

    @torch.inference_mode()
    def classify(images: np.ndarray) -> np.ndarray:
        logits = []
        for batch in torch.from_numpy(images).split(batch_size):
            pixels = (batch.to(device) * preprocessor.rescale_factor - mean) / std
            logits.append(forward(pixels.permute(0, 3, 1, 2).to(dtype)).logits.float().cpu())
        return torch.cat(logits).numpy()

    return classify
