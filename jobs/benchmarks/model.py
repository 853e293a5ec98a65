"""Compares implementations of CvT on decoded images: `cvt-label benchmark model`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import numpy as np
import torch
import typer
from torch.utils.benchmark import Timer

from cvt.architecture import count_macs
from cvt.checkpoints import Checkpoint
from cvt.inference.engine import PRECISIONS, Engine
from cvt.runtimes import RUNTIMES, Precision
from jobs import console
from jobs.benchmarks import figures
from jobs.reference import load_model, transformers_classifier

#: Maps images, uint8 (n, size, size, 3), to logits (n, classes).
Classify = Callable[[np.ndarray], np.ndarray]
EAGER, COMPILED = "transformers, eager", "transformers, compiled"


def model(
    context: typer.Context,
    model: console.ModelOption = "cvt-13",
    size: console.SizeOption = None,
    precision: Annotated[Precision, typer.Option(help="Precision of the model.")] = "fp32",
    device: figures.DeviceOption = "auto",
    rounds: figures.RoundsOption = 3,
    count: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Images per round. Default: 64 on a CPU, 2,048 on a GPU."),
    ] = None,
    batch_size: console.BatchSizeOption = 32,
    output: figures.OutputOption = None,
) -> None:
    """Compare the speed of the engine with that of transformers.

    Measures each runtime of the engine, and transformers' model eager and compiled, on the same random
    pixels. The limit of the machine is the rate of a large matrix product, divided by the
    multiply-accumulates of an image. `verify` compares the results of the variants.

    More exit statuses: 1 if a variant lost images.
    """
    checkpoint = load_model(model, size)
    pixels = checkpoint.preprocessor.size
    shape = count or (2048 if device == "cuda" else 64), pixels, pixels, 3
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    macs = count_macs(checkpoint.architecture, len(checkpoint.labels), pixels)
    variants = available_variants(checkpoint, device, precision, batch_size)
    limit = matrix_rate(device, precision) / macs
    rows = figures.compare_rates(variants, images, rounds, EAGER)
    for row in rows:
        row["fraction_of_limit"] = [rate / limit for rate in row["images_per_s"]]
    figures.print_results(context, output, variants=rows)


def available_variants(
    checkpoint: Checkpoint, device: str, precision: Precision, batch_size: int
) -> dict[str, Classify]:
    """Returns transformers' model and the runtimes of the engine that this machine supports."""
    reference = partial(transformers_classifier, checkpoint, device, precision, batch_size)
    variants: dict[str, Classify] = {EAGER: reference(), COMPILED: reference(compiled=True)}
    for runtime in RUNTIMES:
        try:
            engine = Engine(
                checkpoint.model,
                checkpoint.preprocessor,
                device=device,
                precision=precision,
                runtime=runtime,
                batch_size=batch_size,
            )
        except (ImportError, ValueError) as error:
            console.print_notice(f"engine, {runtime}: skipped: {error}")
        else:
            variants[f"engine, {runtime}"] = partial(_logits, engine)
    return variants


def _logits(engine: Engine, images: np.ndarray) -> np.ndarray:
    return engine(images).logits


def matrix_rate(device: str, precision: str) -> float:
    """Returns the maximum multiply-accumulates per second of a large matrix product."""
    size = 8192 if device == "cuda" else 2048  # large enough that launch overhead is negligible
    a, b = (torch.randn(size, size).to(device, PRECISIONS[precision]) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return size**3 / min(timer.blocked_autorange(min_run_time=1.0).times)
