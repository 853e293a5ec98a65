"""Checks and measures a machine with a GPU within minutes: `cvt-label benchmark gpu`."""

from __future__ import annotations

import io
import itertools
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from PIL import Image

from jobs import console
from jobs.benchmarks import figures
from jobs.benchmarks.end_to_end import pack_images
from jobs.benchmarks.sections import FAILED, NOT_RUN, SectionResult, run_section
from jobs.reference import load_model, read_images
from pipeline.dataflow.local_executor import usable_cpus

_MODULE = "jobs.benchmarks.gpu_sections"
#: Seconds that a section needs at least: its process imports PyTorch and loads a model.
_MIN_S = 20.0


class _Plan(NamedTuple):
    """A section: its maximum seconds, and what it is for."""

    seconds: float
    purpose: str


#: The sections, the most important first. The names are those of `gpu_sections`.
SECTIONS = {
    "machine": _Plan(60, "the GPU, its driver and the packages"),
    "nvjpeg": _Plan(60, "check: nvJPEG and the GPU decoder against Pillow"),
    "precisions": _Plan(75, "check: the engine in each precision against transformers"),
    "limits": _Plan(45, "matrix rate by precision, copies between host and GPU"),
    "decoding": _Plan(75, "rates of both decoders, and the best decode.cpu_share"),
    "model": _Plan(90, "engine and transformers by precision, eager"),
    "memory": _Plan(60, "check: a full GPU loses no image"),
    "streams": _Plan(60, "check: concurrent calls give the same bits"),
    "pipeline": _Plan(120, "whole jobs without Ray, by decoder and precision"),
    "graphs": _Plan(180, "check: CUDA graphs; rates of the compiled engine by precision"),
    "ray": _Plan(120, "whole jobs on Ray, by decoder"),
    "compiled": _Plan(150, "transformers compiled, by precision"),
}


def gpu(
    context: typer.Context,
    images: Annotated[
        str | None, typer.Option(metavar="URI", help="Folder or URI of shards. Default: synthetic JPEGs.")
    ] = None,
    model: console.ModelOption = "cvt-13",
    size: console.SizeOption = None,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="Number of different images.")] = 512,
    job_images: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=2, help="Images of a whole job. Default: 64 on a CPU, 50,000 on a GPU."
        ),
    ] = None,
    batch_size: console.BatchSizeOption = 256,
    device: figures.DeviceOption = "auto",
    minutes: Annotated[float, typer.Option(metavar="N", min=0.5, help="Maximum duration in total.")] = 10,
    sections: Annotated[str, typer.Option(metavar="NAMES", help="Sections to run, or all.")] = "all",
    output: figures.OutputOption = Path("gpu.json"),
) -> None:
    """Check and measure a machine with a GPU.

    Checks nvJPEG, precisions, memory, streams and CUDA graphs. Measures the limits of the card, both
    decoders, the engine, and whole jobs, in comparison with transformers. Each section runs in its own
    process, the most important first, and the file is written after each section. What cannot run, for lack
    of a GPU, a package or time, is reported with its reason, and is not a failure.

    More exit statuses: 1 if a check failed, or an image is missing.
    """
    names = list(SECTIONS) if sections == "all" else sections.split(",")
    if not SECTIONS.keys() >= {*names}:
        raise typer.BadParameter(f"choose from {', '.join(SECTIONS)}, or all", param_hint="--sections")
    end = time.monotonic() + 60 * minutes
    header = figures.describe_machine(context)
    results: list[SectionResult] = []
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        settings: dict[str, Any] = {"model": model, "size": size, "device": device}
        settings["batch_size"] = batch_size
        settings |= {"tars": f"{folder}/images", "cores": usable_cpus()}
        settings["job_images"] = job_images or (50_000 if device == "cuda" else 64)
        console.print_notice("packing the images")
        preprocessor = load_model(model, size).preprocessor
        found = (
            (data for data, _ in read_images(images, preprocessor))
            if images
            else map(synthetic_jpeg, itertools.count())
        )
        encoded = list(itertools.islice(found, count))
        pack_images(iter(encoded), Path(settings["tars"]), len(encoded), 1)
        for name in names:
            console.print_notice(f"{name}: {SECTIONS[name].purpose}")
            left = end - time.monotonic()
            if left < _MIN_S:
                result = SectionResult(name, NOT_RUN, "the time of --minutes is over")
            else:
                result = run_section(_MODULE, name, settings, min(left, SECTIONS[name].seconds))
            results.append(result)
            if result.status != "ok":
                console.print_notice(f"{name}: {result.status}: {result.reason}")
            if output is not None:
                figures.write_results(output, header, sections=[vars(each) for each in results])
    summary = [{k: v for k, v in vars(each).items() if k != "rows"} for each in results]
    tables: dict[str, list[dict[str, Any]]] = {
        each.section: _uniform(each.rows) for each in results if each.rows
    }
    figures.print_tables(**tables, sections=summary)
    if failed := [each.section for each in results if each.status == FAILED]:
        raise figures.BenchmarkError(f"failed: {', '.join(failed)}")


def synthetic_jpeg(number: int) -> bytes:
    """Returns a JPEG of 500 x 375 pixels and some 60 KB, with coarse and fine structure like a photograph."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((500, 375), 3)
    pixels = np.asarray(coarse, np.float32) + rng.normal(0, 8, (375, 500, 1))
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _uniform(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows with the fields of all rows."""
    fields = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in fields} for row in rows]
