"""Compares the engine with transformers' model on real images: `cvt-label verify`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cvt.runtimes import Device, Precision, Runtime, precisions_of
from jobs import console
from pipeline.config import ConfigError

if TYPE_CHECKING:
    import numpy as np

#: Minimum fraction of images with the same top class, and maximum difference of a logit, by precision.
GOALS = {"fp32": (1.0, 1e-4), "bf16": (0.995, float("inf")), "fp16": (0.995, float("inf"))}


@console.exit_on_error()
def verify(
    images: Annotated[str, typer.Option("--images", help="Shards with images: a folder or a URI.")],
    model: Annotated[
        str, typer.Option("--model", help="cvt-13, cvt-21 or cvt-w24 (random weights), or as model.path.")
    ] = "fashion-mnist",
    size: Annotated[int | None, typer.Option(min=32, help="Pixels, with random weights (224).")] = None,
    precision: Annotated[
        Precision | None, typer.Option("--precision", help="By default, each that the runtime has.")
    ] = None,
    runtime: Annotated[Runtime, typer.Option("--runtime")] = "torch",
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
    from cvt.inference import Engine  # PyTorch takes seconds, which --help need not wait for
    from jobs.reference import load_images, load_model, transformers_classifier

    checkpoint = load_model(model, size)
    network, preprocessor = checkpoint.model, checkpoint.preprocessor
    pixels = load_images(images, preprocessor, count)
    try:
        engines = [
            Engine(network, preprocessor, device=device, precision=p, runtime=runtime, batch_size=batch_size)
            for p in ([precision] if precision else precisions_of(runtime))
        ]
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from None
    console.print_notice(f"{len(pixels):,} images; transformers' model first")
    wanted = transformers_classifier(checkpoint)(pixels)
    table = Table("runtime", "precision", "images", "same top class", "largest logit difference", "reached")
    status = console.ExitStatus.OK
    for engine in engines:
        console.print_notice(f"engine, {runtime}, {engine.precision}")
        top1, difference = agreement(engine(pixels).logits, wanted)
        reached = is_reached(engine.precision, top1, difference)
        figures = f"{len(pixels):,}", f"{top1:.2%}", f"{difference:.2g}"
        table.add_row(runtime, engine.precision, *figures, "yes" if reached else "no")
        status = status if reached else console.ExitStatus.FAILED
    console.stdout.print(table)
    sys.exit(status)


def agreement(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Returns the fraction of images with the same top class, and the maximum difference of logits.

    Both arguments are logits (n, classes).
    """
    return float((found.argmax(1) == wanted.argmax(1)).mean()), float(abs(found - wanted).max())


def is_reached(precision: str, top1: float, difference: float) -> bool:
    """Whether an agreement meets `GOALS`."""
    least, most = GOALS[precision]
    return top1 >= least and difference <= most


if __name__ == "__main__":
    console.run_command(verify)
