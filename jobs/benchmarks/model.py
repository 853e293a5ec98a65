"""Ways to run a CvT on decoded images: `cvt-label benchmark model`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import numpy as np
import torch
import typer

from cvt.checkpoints import Checkpoint
from cvt.counting import count_macs
from cvt.inference.engine import PRECISIONS, Engine
from cvt.runtimes import RUNTIMES, Precision, precisions_of
from jobs.benchmarks import figures
from jobs.console import exit_on_error, print_notice
from jobs.reference import load_model, transformers_classifier

#: Images, uint8 (n, size, size, 3), to logits (n, classes).
Classify = Callable[[np.ndarray], np.ndarray]
EAGER = "transformers, eager"


@dataclass
class Variant:
    """The figures of one way to run the model; lists have one value per round.

    Attributes:
        of_limit: images/s over what a matrix product on this machine allows.
        to_eager: images/s over those of transformers' eager model.
        ready_s: seconds until it was ready, compilation and first call included.
    """

    variant: str
    ready_s: float
    images_per_s: list[float] = field(default_factory=list)
    of_limit: list[float] = field(default_factory=list)
    to_eager: list[float] = field(default_factory=list)


@exit_on_error()
def model(
    context: typer.Context,
    model: figures.Model = "cvt-13",
    size: figures.Size = None,
    precision: Annotated[Precision, typer.Option("--precision")] = "fp32",
    device: figures.OnDevice = "auto",
    rounds: figures.Rounds = 3,
    count: Annotated[int | None, typer.Option(min=1, help="Images in a round (64; 2,048 on a GPU).")] = None,
    batch_size: figures.BatchSize = 32,
    output: figures.Output = None,
) -> None:
    """Measure the engine's runtimes and transformers' model, eager and compiled, in turn, on the same noise.

    The limit is the rate of a large matrix product on this machine, in the same round, over the
    multiply-accumulates of an image. `verify` compares what the engine and transformers' model compute.

    Exit status: 0; 1 if a variant lost images; 2 if an option is wrong; 4 if the model is unusable.
    """
    checkpoint = load_model(model, size)
    pixels = checkpoint.preprocessor.size
    shape = count or (2048 if device == "cuda" else 64), pixels, pixels, 3
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    macs = count_macs(checkpoint.model.config, pixels, pixels)
    variants = available_variants(checkpoint, device, precision, batch_size)
    found = measure(images, variants, rounds, lambda: matrix_rate(device, precision) / macs)
    figures.report(context, output, variants=found)


def available_variants(
    checkpoint: Checkpoint, device: str, precision: Precision, batch_size: int
) -> dict[str, Callable[[], Classify]]:
    """Returns what prepares each variant, which may take minutes, by name."""
    theirs = partial(transformers_classifier, checkpoint, device, precision, batch_size)
    variants: dict[str, Callable[[], Classify]] = {
        EAGER: theirs,
        "transformers, compiled": partial(theirs, compiled=True),
    }
    for runtime in RUNTIMES:
        if precision in precisions_of(runtime) and (runtime != "openvino" or device == "cpu"):
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


def measure(
    images: np.ndarray,
    variants: Mapping[str, Callable[[], Classify]],
    rounds: int,
    limit: Callable[[], float],
) -> list[Variant]:
    """Prepares variants, `EAGER` among them, and measures them in turn.

    Args:
        images: uint8 (n, size, size, 3).
        variants: what prepares each, by name.
        rounds: number of rounds.
        limit: measures the images/s that this machine allows.

    Raises:
        BenchmarkError: a variant lost an image.
    """
    prepared: list[tuple[Variant, Classify]] = []
    for name, prepare in variants.items():
        print_notice(f"{name}: getting ready")
        start = time.perf_counter()
        try:
            classify = prepare()
        except ImportError as error:
            print_notice(f"not measured: {error}")
            continue
        if (done := len(classify(images))) != len(images):
            raise figures.BenchmarkError(f"{name}: {done} images came out of {len(images)}")
        prepared.append((Variant(name, time.perf_counter() - start), classify))
    for turn in range(1, rounds + 1):
        print_notice(f"round {turn} of {rounds}")
        most = limit()
        for one, classify in prepared:
            start = time.perf_counter()
            classify(images)
            one.images_per_s.append(len(images) / (time.perf_counter() - start))
            one.of_limit.append(one.images_per_s[-1] / most)
    found = {one.variant: one for one, _ in prepared}
    for one in found.values():
        one.to_eager = figures.ratios(one.images_per_s, found[EAGER].images_per_s)
    return list(found.values())


def matrix_rate(device: str, precision: str) -> float:
    """Returns multiply-accumulates per second of a large matrix product, the best of ten."""
    size, repeats = (8192, 20) if device == "cuda" else (2048, 1)  # so large that its start does not count
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
