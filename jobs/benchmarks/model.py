"""Compares implementations of CvT on decoded images: `cvt-label benchmark model`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer

from cvt.checkpoints import Checkpoint
from cvt.counting import count_macs
from cvt.inference.engine import PRECISIONS, Engine
from cvt.runtimes import RUNTIMES, Precision, supported_precisions
from jobs.benchmarks import figures
from jobs.console import exit_on_error, print_notice
from jobs.reference import load_model, transformers_classifier

#: Maps images, uint8 (n, size, size, 3), to logits (n, classes).
Classify = Callable[[np.ndarray], np.ndarray]
EAGER = "transformers, eager"


@exit_on_error()
def model(
    context: typer.Context,
    model: figures.Model = "cvt-13",
    size: figures.Size = None,
    precision: Annotated[Precision, typer.Option(help="Precision of the model.")] = "fp32",
    device: figures.DeviceOption = "auto",
    rounds: figures.Rounds = 3,
    count: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Images per round. Default: 64 on a CPU, 2,048 on a GPU."),
    ] = None,
    batch_size: figures.BatchSize = 32,
    output: figures.Output = None,
) -> None:
    """Compare the speed of the engine with that of transformers.

    Measures each runtime of the engine, and transformers' model eager and compiled, on the same random
    pixels. The limit of the machine is the rate of a large matrix product, divided by the
    multiply-accumulates of an image. `verify` compares the results of the variants.

    Exit status: 0 on success; 1 if a variant lost images; 2 if an option is not valid; 4 if the model cannot
    be loaded.
    """
    checkpoint = load_model(model, size)
    pixels = checkpoint.preprocessor.size
    shape = count or (2048 if device == "cuda" else 64), pixels, pixels, 3
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    macs = count_macs(checkpoint.model.config, len(checkpoint.labels), pixels, pixels)
    variants = available_variants(checkpoint, device, precision, batch_size)
    results = compare_variants(images, variants, rounds, matrix_rate(device, precision) / macs)
    figures.print_results(context, output, variants=results)


def available_variants(
    checkpoint: Checkpoint, device: str, precision: Precision, batch_size: int
) -> dict[str, Callable[[], Classify]]:
    """Returns, by name, a function that prepares the variant. Preparation may take minutes."""
    eager = partial(transformers_classifier, checkpoint, device, precision, batch_size)
    variants: dict[str, Callable[[], Classify]] = {
        EAGER: eager,
        "transformers, compiled": partial(eager, compiled=True),
    }
    for runtime in RUNTIMES:
        if precision in supported_precisions(runtime) and (runtime != "openvino" or device == "cpu"):
            prepare = partial(_engine, checkpoint, device, precision, runtime, batch_size)
            variants[f"engine, {runtime}"] = prepare
    return variants


def _engine(checkpoint: Checkpoint, device: str, precision: str, runtime: str, batch_size: int) -> Classify:
    engine = Engine(
        checkpoint.model,
        checkpoint.preprocessor,
        device=device,
        precision=precision,
        runtime=runtime,
        batch_size=batch_size,
    )
    return lambda images: engine(images).logits


def compare_variants(
    images: np.ndarray, variants: Mapping[str, Callable[[], Classify]], rounds: int, limit: float
) -> list[dict[str, Any]]:
    """Prepares and compares the variants, which include `EAGER`; `limit` is in images/s.

    Skips variants whose packages are missing. Raises `BenchmarkError` if a variant lost an image.
    """
    prepared: dict[str, Classify] = {}
    for name, prepare in variants.items():
        try:
            prepared[name] = prepare()
        except ImportError as error:
            print_notice(f"{name}: skipped: {error}")
    rates = figures.measure_rates(prepared, images, rounds)
    return [
        {
            "variant": name,
            "images_per_s": images_per_s,
            "fraction_of_limit": [rate / limit for rate in images_per_s],
            "speedup": figures.ratios(images_per_s, rates[EAGER]),
        }
        for name, images_per_s in rates.items()
    ]


def matrix_rate(device: str, precision: str) -> float:
    """Returns the multiply-accumulates per second of a large matrix product, the best of ten."""
    size, repeats = (
        (8192, 20) if device == "cuda" else (2048, 1)
    )  # large enough that launch overhead is negligible
    a, b = (torch.randn(size, size).to(device, PRECISIONS[precision]) for _ in range(2))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return repeats * size**3 / min(seconds)
