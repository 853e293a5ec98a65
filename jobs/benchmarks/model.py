"""Ways to run a CvT on decoded images: `cvt-label benchmark model`."""

from __future__ import annotations

import importlib.util
import io
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from cvt.checkpoints import Checkpoint
from cvt.counting import count_macs
from cvt.inference.engine import PRECISIONS, Engine
from cvt.inference.network import InferenceNetwork
from cvt.inference.openvino_runtime import import_openvino
from cvt.runtimes import RUNTIMES, precisions_of
from jobs.benchmarks import figures
from jobs.console import check_folder_of, exit_status, found_device, out, precisions_option
from jobs.verify import (
    in_batches,
    load_images,
    load_model,
    normalize,
    to_transformers,
    transformers_classifier,
)

#: Images, uint8 (n, size, size, 3), to logits (n, classes).
Classify = Callable[[np.ndarray], np.ndarray]
#: Largest differences of a logit to transformers' eager float32 that a variant may have, by precision.
TOLERANCES = {"fp32": 1e-3, "bf16": 1.0, "fp16": 0.5}
_EAGER = "transformers, eager"


@dataclass
class Variant:
    """The figures of one way to run the model; lists have one value per round.

    Attributes:
        of_limit: images/s over what a matrix product on this machine allows.
        to_eager: images/s over those of transformers' eager model in float32.
        logits_off: largest difference of a logit to that model.
        ready_s: seconds until it was ready, compilation and first call included.
    """

    variant: str
    size: int
    precision: str
    images_per_s: list[float] = field(default_factory=list)
    of_limit: list[float] = field(default_factory=list)
    to_eager: list[float] = field(default_factory=list)
    logits_off: float = 0.0
    ready_s: float = 0.0


def model(
    context: typer.Context,
    images: Annotated[
        str | None, typer.Option("--images", help="Shards with photographs; by default, noise.")
    ] = None,
    model: figures.Model = "cvt-13",
    size: Annotated[
        list[int] | None, typer.Option("--size", help="Pixels; may be repeated (224, 384).")
    ] = None,
    precision: Annotated[list[str] | None, precisions_option("fp32; on a GPU bf16 too")] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Variants whose names start so; may be repeated.")
    ] = None,
    device: figures.OnDevice = "auto",
    rounds: figures.Rounds = 3,
    count: Annotated[int | None, typer.Option(min=1, help="Images in a round (64; 2,048 on a GPU).")] = None,
    batch_size: figures.BatchSize = 32,
    profile: Annotated[bool, typer.Option("--profile", help="Print the engine's time by operator.")] = False,
    output: figures.Output = None,
) -> None:
    """Measure the engine's runtimes, transformers' model and its exports, in turn, on the same images.

    Each variant's logits are compared with transformers' eager float32 model. The limit is the rate of a
    large matrix product on this machine, in the same round, over the multiply-accumulates of an image.

    Exit status: 0; 1 if a variant gives other logits; 2 if an option is wrong; 4 if images are unreadable.
    """
    device = found_device(device)
    check_folder_of(output)
    count = count or (2048 if device == "cuda" else 64)
    precisions = precision or (["fp32", "bf16"] if device == "cuda" else ["fp32"])
    found: list[Variant] = []
    for pixels in size or [224, 384]:
        with exit_status():
            checkpoint = load_model(model, pixels)
            decoded = np.random.default_rng(0).integers(0, 256, (count, pixels, pixels, 3), dtype=np.uint8)
            if images is not None:
                decoded = load_images(images, checkpoint.preprocessor, count)
        with tempfile.TemporaryDirectory() as folder:
            variants = available_variants(checkpoint, device, batch_size, precisions, Path(folder))
            chosen = [each for each in variants if not only or each[0].startswith(tuple(only))]
            found += measure(checkpoint, device, decoded, chosen, rounds)
        if profile:
            _profile(checkpoint, decoded[:batch_size], device, precisions[-1])
    figures.report(context, output, variants=found)
    if wrong := [one for one in found if one.logits_off > TOLERANCES[one.precision]]:
        names = (f"{one.variant} in {one.precision} by {one.logits_off:.2g}" for one in wrong)
        raise figures.BenchmarkError(f"logits differ from transformers': {', '.join(names)}")


def measure(
    checkpoint: Checkpoint,
    device: str,
    images: np.ndarray,
    variants: list[tuple[str, str, Callable[[], Classify]]],
    rounds: int,
) -> list[Variant]:
    """Prepares variants, compares their logits, and measures them in turn."""
    size = checkpoint.preprocessor.size
    macs = count_macs(checkpoint.model.config, size, size)
    reference = transformers_classifier(checkpoint)(images)
    made: list[tuple[Variant, Classify]] = []
    for name, precision, make in variants:
        figures.note(f"{size} pixels, {name}, {precision}: getting ready")
        start = time.perf_counter()
        classify = make()
        logits = classify(images)
        ready = time.perf_counter() - start
        if logits.shape != reference.shape:
            raise figures.BenchmarkError(f"{name}: {len(logits)} images came out of {len(images)}")
        difference = float(np.abs(logits - reference).max())
        made.append((Variant(name, size, precision, logits_off=difference, ready_s=ready), classify))
    for turn in range(rounds):
        figures.note(f"{size} pixels: round {turn + 1} of {rounds}")
        limits = {p: matrix_rate(device, p) / macs for p in {one.precision for one, _ in made}}
        for one, classify in made:
            start = time.perf_counter()
            classify(images)
            one.images_per_s.append(len(images) / (time.perf_counter() - start))
            one.of_limit.append(one.images_per_s[-1] / limits[one.precision])
    found = [one for one, _ in made]
    eager = [one.images_per_s for one in found if (one.variant, one.precision) == (_EAGER, "fp32")]
    for one in found:
        one.to_eager = (
            [mine / theirs for mine, theirs in zip(one.images_per_s, *eager, strict=True)] if eager else []
        )
    return found


def available_variants(
    checkpoint: Checkpoint, device: str, batch_size: int, precisions: list[str], folder: Path
) -> Iterator[tuple[str, str, Callable[[], Classify]]]:
    """Yields names, precisions, and what prepares each variant, which may take minutes.

    Precisions are those of the engine and of transformers' model; exported models go into `folder`.
    """
    missing = [n for n in ("openvino", "onnxruntime", "onnxscript") if not importlib.util.find_spec(n)]
    for precision in precisions:
        for runtime in RUNTIMES:
            usable = runtime != "openvino" or (device == "cpu" and "openvino" not in missing)
            if usable and precision in precisions_of(runtime):
                options = {
                    "device": device,
                    "precision": precision,
                    "runtime": runtime,
                    "batch_size": batch_size,
                }
                yield f"engine, {runtime}", precision, partial(_engine, checkpoint, options)
        for name, compiled in ((_EAGER, False), ("transformers, compiled", True)):
            make = partial(transformers_classifier, checkpoint, device, precision, batch_size, compiled)
            yield name, precision, make
    if device == "cpu":
        if missing:
            figures.note(f"not measured without {', '.join(missing)} (pip install 'cvt-label[contenders]')")
        if "openvino" not in missing:
            yield "OpenVINO, transformers' model", "fp32", partial(_openvino, checkpoint, batch_size)
        if not {"onnxruntime", "onnxscript"} & {*missing}:
            make = partial(_onnxruntime, checkpoint, batch_size, str(folder / "model.onnx"))
            yield "ONNX Runtime, transformers' model", "fp32", make


def _engine(checkpoint: Checkpoint, options: dict[str, Any]) -> Classify:
    engine = Engine(checkpoint.model, checkpoint.preprocessor, **options)
    return lambda images: engine(images).logits


def _openvino(checkpoint: Checkpoint, batch_size: int) -> Classify:
    openvino, size = import_openvino(), checkpoint.preprocessor.size
    with torch.inference_mode():
        example = torch.zeros(2, 3, size, size)
        exported = openvino.convert_model(to_transformers(checkpoint), example_input=example)
    hints = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(exported, "CPU", hints)
    streams = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    queue = openvino.AsyncInferQueue(compiled, streams)

    def classify(images: np.ndarray) -> np.ndarray:
        # As OpenVINO's guide to throughput says: one request per stream, the batch spread over them.
        found: dict[int, np.ndarray] = {}
        queue.set_callback(lambda request, at: found.update({at: request.get_output_tensor().data.copy()}))
        for at, batch in enumerate(in_batches(images, max(1, batch_size // streams))):
            queue.start_async([normalize(batch, checkpoint.preprocessor).numpy()], at)
        queue.wait_all()
        return np.concatenate([found[at] for at in sorted(found)])

    return classify


def _onnxruntime(checkpoint: Checkpoint, batch_size: int, path: str) -> Classify:
    import onnxruntime

    size = checkpoint.preprocessor.size
    example = torch.zeros(batch_size, 3, size, size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it reports its progress
        torch.onnx.export(to_transformers(checkpoint), (example,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def classify(images: np.ndarray) -> np.ndarray:
        parts = []
        for batch in in_batches(images, batch_size):
            pixels = normalize(batch, checkpoint.preprocessor).numpy()
            pixels = np.pad(pixels, ((0, batch_size - len(pixels)), (0, 0), (0, 0), (0, 0)))
            parts.append(session.run(None, {name: pixels})[0][: len(batch)])
        return np.concatenate(parts)

    return classify


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


def _profile(checkpoint: Checkpoint, images: np.ndarray, device: str, precision: str) -> None:
    """Prints the time of the engine's network by operator; in this thread, as a profiler sees only one."""
    network = InferenceNetwork(checkpoint.model, checkpoint.preprocessor, PRECISIONS[precision]).to(device)
    if device == "cpu":
        network.pack()
    pixels = torch.from_numpy(images).to(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with torch.inference_mode():
        network(pixels)
        with profiler(activities=activities) as found:
            network(pixels)
    table = found.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=20)
    out.print(table, markup=False, highlight=False)
