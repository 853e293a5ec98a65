"""Compares the engine with transformers' model on real images: `cvt-label verify`.

Measuring speed belongs to `jobs.benchmarks`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cvt.runtimes import Device, precisions_of
from jobs.console import Exit, RuntimesOption, err, exit_status, out, precisions_option, run_alone

if TYPE_CHECKING:
    import numpy as np

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


def verify(
    images: Annotated[str, typer.Option("--images", help="Shards with images: a folder or a URI.")],
    model: Annotated[
        str, typer.Option("--model", help="As model.path in a configuration.")
    ] = "fashion-mnist",
    random: Annotated[
        bool, typer.Option("--random", help="Random weights for --model cvt-13, cvt-21 or cvt-w24.")
    ] = False,
    size: Annotated[int, typer.Option(help="With --random: pixels of the model's images.")] = 224,
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
    from jobs.benchmarks import model_contenders
    from jobs.benchmarks.data import load_images, random_subject

    with exit_status():
        from cvt.inference import Engine
        from pipeline.classify.checkpoint import open_checkpoint
        from pipeline.config import ConfigError
        from pipeline.storage import Storage

        if random:
            subject = random_subject(model, size)
            network, preprocessor = subject.model, subject.preprocessor
        else:
            checkpoint = open_checkpoint(Storage(), model)
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
    wanted = model_contenders.reference(network, preprocessor)(pixels)
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
