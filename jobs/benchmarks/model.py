"""Measures ways to run a CvT on decoded images: `cvt-label benchmark-model`."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cvt.runtimes import Device
from jobs.console import (
    Exit,
    check_folder_of,
    err,
    exit_status,
    found_device,
    out,
    precisions_option,
    run_alone,
)

if TYPE_CHECKING:
    import numpy as np

    from jobs.benchmarks.model_contenders import Classify
    from pipeline.train import TrainingModel


@dataclass
class Way:
    """One way to run the model, and what was measured of it.

    Attributes:
        name: what it is.
        size: of the images, in pixels.
        precision: it computes in.
        ready_s: seconds until it was ready, compilation and first call included.
        difference: largest difference of a logit to transformers' eager float32.
        rates: images/s in each round.
        shares: in each round, of what the machine's own matrix products would allow.
    """

    name: str
    size: int
    precision: str
    ready_s: float
    difference: float
    rates: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)


def benchmark_model(
    images: Annotated[
        str | None, typer.Option("--images", help="Shards with photographs; else the images are noise.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="cvt-13, cvt-21 or cvt-w24; random weights.")
    ] = "cvt-13",
    size: Annotated[
        list[int] | None, typer.Option("--size", help="Pixels; may be repeated (224, 384).")
    ] = None,
    precision: Annotated[list[str] | None, precisions_option("fp32; on a GPU bf16 too")] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Ways whose names begin so; may be repeated (all).")
    ] = None,
    device: Annotated[Device, typer.Option("--device")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Times that each way is measured.")] = 3,
    count: Annotated[int | None, typer.Option(min=1, help="Images in a round (64; 2,048 on a GPU).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch, everywhere.")] = 32,
    profile: Annotated[bool, typer.Option("--profile", help="Print the engine's time by operator.")] = False,
    output: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
) -> None:
    """Measure the engine's runtimes, transformers' model and its exports, in turn, on the same images.

    Each way is checked against transformers' eager float32 logits. The limit is what a large matrix product
    reaches on this machine, in the same round, over the multiply-accumulates of an image.

    Exit status: 0; 1 where a way gave other logits; 4 when the images can't be read.
    """
    device = found_device(device)
    check_folder_of(output)
    count = count or (2048 if device == "cuda" else 64)
    precisions = precision or (["fp32", "bf16"] if device == "cuda" else ["fp32"])
    ways: list[Way] = []
    for pixels in size or [224, 384]:
        with exit_status():
            subject, decoded = _load(images, model, count, pixels)
        with tempfile.TemporaryDirectory() as folder:
            ways += _measure(subject, decoded, device, batch_size, precisions, only, rounds, Path(folder))
        if profile:
            _profile(subject, decoded[:batch_size], device, precisions[-1])
    _print(ways)
    if output is not None:
        output.write_text(json.dumps([asdict(way) for way in ways], indent=2) + "\n")
    from jobs.benchmarks.model_contenders import TOLERANCES

    wrong = [way for way in ways if way.difference > TOLERANCES[way.precision]]
    for way in wrong:
        err.print(f"cvt-label: {way.name}: logits differ by {way.difference:.2g}", markup=False)
    sys.exit(Exit.FAILED if wrong else Exit.OK)


def _load(images: str | None, model: str, count: int, size: int) -> tuple[TrainingModel, np.ndarray]:
    """A model with random weights, and images, uint8 (count, size, size, 3)."""
    import numpy as np

    from jobs.benchmarks.data import load_images, random_subject

    subject = random_subject(model, size)
    if images is None:
        shape = (count, size, size, 3)
        return subject, np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return subject, load_images(images, subject.preprocessor, count)


def _measure(
    subject: TrainingModel,
    images: np.ndarray,
    device: str,
    batch_size: int,
    precisions: list[str],
    only: list[str] | None,
    rounds: int,
    folder: Path,
) -> list[Way]:
    import numpy as np

    from cvt.counting import count_macs
    from jobs.benchmarks import model_contenders

    size = subject.preprocessor.size
    reference = model_contenders.reference(subject.model, subject.preprocessor)(images)
    macs = count_macs(subject.model.config, size, size)
    made: list[tuple[Way, Classify]] = []
    skipped: list[str] = []
    for name, precision, make in model_contenders.contenders(
        subject.model, subject.preprocessor, device, batch_size, precisions, folder
    ):
        if only and not any(name.startswith(start) for start in only):
            skipped.append(name)
            continue
        err.print(f"{size} pixels, {name}, {precision}: getting ready", highlight=False)
        start = time.perf_counter()
        classify = make()
        logits = classify(images)
        ready = time.perf_counter() - start
        if logits.shape != reference.shape:
            raise RuntimeError(f"{name}: {len(logits)} images came out of {len(images)}")
        difference = float(np.abs(logits - reference).max())
        made.append((Way(name, size, precision, ready, difference), classify))
    if not made:
        raise typer.BadParameter(f"none of {', '.join(skipped)}", param_hint="--only")
    for turn in range(rounds):
        err.print(f"{size} pixels: round {turn + 1} of {rounds}", highlight=False)
        limits = {p: model_contenders.matrix_rate(device, p) / macs for p in precisions}
        for way, classify in made:
            start = time.perf_counter()
            classify(images)
            way.rates.append(len(images) / (time.perf_counter() - start))
            way.shares.append(way.rates[-1] / limits[way.precision])
    return [way for way, _ in made]


def _profile(subject: TrainingModel, images: np.ndarray, device: str, precision: str) -> None:
    """Prints where the time of the engine's network goes; run here, since a profiler sees one thread."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from cvt.inference.engine import PRECISIONS
    from cvt.inference.network import InferenceNetwork

    network = InferenceNetwork(subject.model, subject.preprocessor, PRECISIONS[precision]).to(device)
    if device == "cpu":
        network.pack()
    pixels = torch.from_numpy(images).to(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with torch.inference_mode():
        network(pixels)
        with profiler(activities=activities) as found:
            network(pixels)
    by = f"self_{device}_time_total"
    out.print(found.key_averages().table(sort_by=by, row_limit=20), markup=False, highlight=False)


def _print(ways: list[Way]) -> None:
    base = {(way.size, way.name): way for way in ways if way.precision == "fp32"}
    table = Table(
        "images/s", "size", "precision", "median", "least", "most", "of limit", "x eager", "logits", "ready"
    )
    for way in ways:
        eager = base.get((way.size, "transformers, eager"))
        ratio = "-"
        if eager is not None:
            ratio = f"{statistics.median(a / b for a, b in zip(way.rates, eager.rates, strict=True)):.2f}"
        table.add_row(
            way.name,
            str(way.size),
            way.precision,
            *(f"{value:,.2f}" for value in (statistics.median(way.rates), min(way.rates), max(way.rates))),
            f"{statistics.median(way.shares):.0%}",
            ratio,
            f"{way.difference:.1g}",
            f"{way.ready_s:,.0f} s",
        )
    out.print(table)


if __name__ == "__main__":
    run_alone(benchmark_model)
