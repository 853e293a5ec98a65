"""Compares the engine with transformers' model on images: `cvt-label verify`."""

import sys
from typing import Annotated, Any, Literal

import numpy as np
import typer

from cvt.runtimes import Device, Precision, fastest_runtime, supported_precisions
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
    runtime: Annotated[
        Literal["auto", "torch", "compile", "openvino"],
        typer.Option(help="Runtime of the engine. auto: the one that label chooses for a new partition."),
    ] = "auto",
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
    # Importing PyTorch takes seconds, and --help does not need it.
    import torch

    from cvt.inference import Engine
    from jobs.reference import load_images, load_model, transformers_classifier

    checkpoint = load_model(model, size)
    network, preprocessor = checkpoint.model, checkpoint.preprocessor
    pixels = load_images(images, preprocessor, count)
    processor = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    engines = []
    for name in [precision] if precision else supported_precisions(runtime):
        chosen = fastest_runtime(processor, name) if runtime == "auto" else runtime
        options: dict[str, Any] = {"device": device, "precision": name, "runtime": chosen}
        try:
            engines.append(Engine(network, preprocessor, batch_size=batch_size, **options))
        except (ValueError, ImportError) as error:
            if precision or not engines:
                raise ConfigError(str(error)) from None
            console.print_notice(f"engine: {name}: skipped: {error}")
    console.print_notice(f"transformers' model: {pluralize(len(pixels), 'image')}")
    reference = transformers_classifier(checkpoint)(pixels)
    rows, status = [], console.ExitStatus.OK
    for engine in engines:
        console.print_notice(f"engine: {engine.runtime}, {engine.precision}")
        top1, difference, passed = agreement(engine.precision, engine(pixels).logits, reference)
        figures = f"{len(pixels):,}", f"{top1:.2%}", f"{difference:.2g}", "yes" if passed else "no"
        rows.append([engine.runtime, engine.precision, *figures])
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
