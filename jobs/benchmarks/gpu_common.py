"""What the sections of `cvt-label benchmark gpu` share: models, images, decoders and rates."""

from __future__ import annotations

import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvt.checkpoints import Checkpoint
from cvt.inference import Engine
from cvt.runtimes import Precision
from jobs.benchmarks.sections import CannotRunError, CheckError, Report, Row
from jobs.reference import MAX_PIXELS, load_model
from pipeline.decode import DecodeOptions
from pipeline.decode.gpu import GpuDecoder
from pipeline.read import Chunk, Sample, split_into_chunks

#: Seconds of a measurement.
SECONDS = 3.0
BY_IMPORTANCE: tuple[Precision, ...] = ("bf16", "fp32", "fp16")


def require_gpu(settings: Row) -> None:
    """Raises `CannotRunError` without a GPU."""
    if settings["device"] != "cuda":
        raise CannotRunError("needs a GPU (--device cuda)")


def read_tars(folder: str) -> list[bytes]:
    """Returns the images of all tars in a folder."""
    found: list[bytes] = []
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]
    return found


def chunks_of(images: Sequence[bytes], size: int = 1024) -> Iterator[Chunk]:
    """Yields encoded images as chunks."""
    samples = (Sample(str(number), data) for number, data in enumerate(images))
    return split_into_chunks(samples, 0, size, 1024**3)


@cache
def checkpoint_of(model: str, size: int | None) -> Checkpoint:
    """Loads a model once."""
    return load_model(model, size)


def make_engine(
    settings: Row, precision: str, runtime: str = "torch", is_warm: bool = True, **changes: Any
) -> Engine:
    """Returns an engine of the model that the settings name."""
    arguments = {"device": settings["device"], "batch_size": settings["batch_size"]} | changes
    checkpoint = checkpoint_of(settings["model"], settings["size"])
    try:
        engine = Engine(
            checkpoint.model, checkpoint.preprocessor, precision=precision, runtime=runtime, **arguments
        )
    except (ValueError, ImportError) as error:
        raise CannotRunError(str(error)) from error
    if is_warm:
        with compiler_required():
            engine.warm_up()
    return engine


@contextmanager
def compiler_required() -> Iterator[None]:
    """Raises `CannotRunError` if `torch.compile` finds no C compiler or no Triton."""
    try:
        yield
    except Exception as error:
        if "compiler" in str(error) or "Triton" in str(error):
            raise CannotRunError(" ".join(str(error).split())[:300]) from error
        raise


def decode_options(settings: Row) -> DecodeOptions:
    """Returns how images are decoded for the model that the settings name."""
    return DecodeOptions(checkpoint_of(settings["model"], settings["size"]).preprocessor, MAX_PIXELS)


def gpu_decoder(settings: Row, **options: Any) -> GpuDecoder:
    """Returns the GPU decoder; raises `CannotRunError` without a GPU or torchvision."""
    require_gpu(settings)
    try:
        return GpuDecoder(decode_options(settings), "cuda", **options)
    except (ImportError, ValueError) as error:
        raise CannotRunError(str(error)) from error


def random_pixels(settings: Row, count: int) -> np.ndarray:
    """Returns images for the model, uint8 (n, size, size, 3)."""
    size = checkpoint_of(settings["model"], settings["size"]).preprocessor.size
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def rate(call: Callable[[], int], seconds: float = SECONDS) -> list[float]:
    """Returns the images/s of repeated calls after one warm-up; a call returns its number of images."""
    call()
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        count = call()
        rates.append(count / (time.perf_counter() - start))
    return rates


def check(condition: bool, message: str) -> None:
    """Raises `CheckError` if the condition is false."""
    if not condition:
        raise CheckError(message)


@contextmanager
def tensorfloat_32(allowed: bool) -> Iterator[None]:
    """Allows or forbids TensorFloat-32 in the block."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


def measure_classifier(
    report: Report, variant: str, precision: str, classifier: Callable[[Any], np.ndarray], pixels: Any
) -> None:
    """Reports the images/s of a classifier; raises `CheckError` if an image is missing."""

    def call() -> int:
        found = len(classifier(pixels))
        check(found == len(pixels), f"{variant}: {found} of {len(pixels)} images came out")
        return found

    report({"variant": variant, "precision": precision, "images_per_s": rate(call)})
