"""Compares the engine with transformers' model on images: `cvt-label verify`."""

import sys
from typing import Annotated

import numpy as np
import typer

from cvt.runtimes import Device, Precision, Runtime, supported_precisions
from jobs import console
from pipeline.config import ConfigError
from pipeline.text import pluralize

#: By precision: minimum fraction of images with the same top class, maximum difference of a logit.
GOALS = {"fp32": (1.0, 1e-4), "bf16": (0.995, float("inf")), "fp16": (0.995, float("inf"))}


def verify(
    images: console.ImagesOption,
    model: console.ModelOption = "fashion-mnist",
    size: console.SizeOption = None,
    precision: Annotated[Precision | None, typer.Option(help="Default: each that the runtime has.")] = None,
    runtime: Annotated[Runtime, typer.Option(help="Runtime of the engine.")] = "torch",
    device: Annotated[Device, typer.Option(help="Device of the engine.")] = "auto",
    count: Annotated[int, typer.Option(metavar="N", min=1, help="Maximum number of images.")] = 1000,
    batch_size: console.BatchSizeOption = 32,
) -> None:
    """Compare the engine's results with those of transformers.

    Both classify the same pixels; transformers computes in float32. In fp32, the engine passes if all images
    have the same top class and logits differ by at most 1e-4. In bf16 and fp16, the engine passes if 99.5 %
    of the images have the same top class.

    More exit statuses: 1 if the engine fails; 2 if the runtime, the precision or the device is not available.
    """
    from cvt.inference import Engine  # importing PyTorch takes seconds, and --help does not need it
    from jobs.reference import load_images, load_model, transformers_classifier

    checkpoint = load_model(model, size)
    network, preprocessor = checkpoint.model, checkpoint.preprocessor
    pixels = load_images(images, preprocessor, count)
    try:
        engines = [
            Engine(network, preprocessor, device=device, precision=p, runtime=runtime, batch_size=batch_size)
            for p in ([precision] if precision else supported_precisions(runtime))
        ]
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from None
    console.print_notice(f"transformers' model: {pluralize(len(pixels), 'image')}")
    reference = transformers_classifier(checkpoint)(pixels)
    rows, status = [], console.ExitStatus.OK
    for engine in engines:
        console.print_notice(f"engine: {runtime}, {engine.precision}")
        top1, difference, passed = agreement(engine.precision, engine(pixels).logits, reference)
        figures = f"{len(pixels):,}", f"{top1:.2%}", f"{difference:.2g}", "yes" if passed else "no"
        rows.append([runtime, engine.precision, *figures])
        if not passed:
            status = console.ExitStatus.FAILED
    numbers = ["images", "same top class", "max logit difference", "passed"]
    console.print_table("Agreement with transformers", ["runtime", "precision"], numbers, rows)
    sys.exit(status)


def agreement(precision: str, logits: np.ndarray, reference: np.ndarray) -> tuple[float, float, bool]:
    """Returns the fraction of equal top classes, the maximum difference, and whether both meet `GOALS`."""
    top1 = float((logits.argmax(1) == reference.argmax(1)).mean())
    difference = float(abs(logits - reference).max())
    min_top1, max_difference = GOALS[precision]
    return top1, difference, top1 >= min_top1 and difference <= max_difference
