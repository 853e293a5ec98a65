"""Sections of `cvt-label benchmark gpu` that check results: a wrong result is a failure.

On a CPU, the sections run as far as they need no GPU, so that their code is tested without one.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cvt.inference.engine import PRECISIONS
from jobs.benchmarks.gpu_common import (
    BY_IMPORTANCE,
    check,
    checkpoint_of,
    chunks_of,
    decode_options,
    gpu_decoder,
    make_engine,
    measure_classifier,
    random_pixels,
    read_tars,
    require_gpu,
)
from jobs.benchmarks.sections import CannotRunError, Report, Row
from jobs.reference import load_images, transformers_classifier
from jobs.verify import agreement
from pipeline.decode import decode_chunk
from pipeline.decode.gpu import nvjpeg
from pipeline.read import Chunk

#: Images of the bundled test set for the checks of labels.
_TEST_IMAGES = Path(__file__).parents[1] / "data" / "fashion-mnist"
_TEST_COUNT = 1000
#: Maximum mean difference in gray levels between nvJPEG and Pillow, for smooth images and for any images.
_MAX_SMOOTH, _MAX_ANY = 1.5, 6.0
#: Maximum difference of float32 logits between two batch sizes.
_MAX_ROUNDING = 1e-3


def jpeg_kinds() -> dict[str, bytes]:
    """Returns JPEGs of all kinds that nvJPEG decodes: of a smooth picture, so that decoders hardly differ."""
    x, y = np.meshgrid(np.linspace(0, 255, 301), np.linspace(0, 255, 203))
    smooth = Image.fromarray(np.stack([x, y, 255 - (x + y) / 2], -1).astype(np.uint8))
    found: dict[str, bytes] = {}
    for mode in ("RGB", "L"):
        for progressive in (False, True):
            for name, subsampling in (("4:4:4", 0), ("4:2:2", 1), ("4:2:0", 2)):
                stream = io.BytesIO()
                smooth.convert(mode).save(
                    stream, "JPEG", quality=95, progressive=progressive, subsampling=subsampling
                )
                kind = f"{mode} {'progressive' if progressive else 'baseline'} {name}"
                if mode == "RGB" or subsampling == 0:
                    found[kind] = stream.getvalue()
    for width, height in ((1, 1), (7, 3), (17, 500), (4000, 3000)):
        stream = io.BytesIO()
        smooth.resize((width, height)).save(stream, "JPEG", quality=95, subsampling=0)
        found[f"{width} x {height}"] = stream.getvalue()
    return found


def check_nvjpeg(settings: Row, report: Report) -> None:
    """Compares nvJPEG with Pillow by kind of JPEG, and the GPU decoder with the CPU's on the images."""
    require_gpu(settings)
    try:
        decode_jpegs = nvjpeg(torch.device("cuda"))
    except (ImportError, ValueError) as error:
        raise CannotRunError(str(error)) from error
    problems: list[str] = []

    def compare(kind: str, files: Sequence[bytes], limit: float) -> None:
        try:
            first, second = ([image.cpu().numpy() for image in decode_jpegs([*files])] for _ in range(2))
        except RuntimeError as error:
            report({"kind": kind, "images": len(files), "refused": str(error)[:200]})
            return
        differences, equal = [], 0
        for data, decoded in zip(files, first, strict=True):
            expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16).transpose(2, 0, 1)
            differences.append(
                np.abs(decoded - expected) if decoded.shape == expected.shape else np.array(255)
            )
            equal += int(differences[-1].max() == 0)
        means = [float(each.mean()) for each in differences]
        is_repeatable = all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        row: Row = {"kind": kind, "images": len(files), "mean_difference": round(statistics.mean(means), 3)}
        row |= {"worst_image": round(max(means), 3), "worst_pixel": max(int(x.max()) for x in differences)}
        report(row | {"equal_to_pillow": equal, "repeatable": is_repeatable})
        if statistics.mean(means) > limit or not is_repeatable:
            problems.append(kind)

    for kind, data in jpeg_kinds().items():
        compare(kind, [data], _MAX_SMOOTH)
    plain = [data for data in read_tars(settings["tars"]) if data.startswith(b"\xff\xd8\xff")]
    compare("images of the benchmark", plain[:64], _MAX_ANY)
    decoder = gpu_decoder(settings)
    for chunk in chunks_of([*read_tars(settings["tars"])[:64], *jpeg_kinds().values(), b"", b"no image"]):
        done, again = decoder(chunk), decoder(chunk)
        expected = decode_chunk(chunk, decode_options(settings))
        on_gpu = next(iter(done.metrics.values())).decoded_on_gpu
        same = torch.equal(torch.as_tensor(done.pixels).cpu(), torch.as_tensor(again.pixels).cpu())
        report({"kind": "GPU decoder", "images": len(chunk.samples), "on_gpu": on_gpu, "repeatable": same})
        check(done.samples.equals(expected.samples), "sizes or errors differ from those of the CPU decoder")
        check(same, "the GPU decoder gives other pixels at a second attempt")
        check(on_gpu > 0, "the GPU decoded no image")
    check(not problems, f"nvJPEG differs too much from Pillow, or from itself: {', '.join(problems)}")


def check_precisions(settings: Row, report: Report, runtimes: Sequence[str] = ("torch",)) -> None:
    """Compares the engine with transformers in float32, on the bundled model and its test set."""
    small = settings | {"model": "fashion-mnist", "size": None}
    checkpoint = checkpoint_of("fashion-mnist", None)
    pixels = load_images(str(_TEST_IMAGES), checkpoint.preprocessor, _TEST_COUNT)
    reference = transformers_classifier(checkpoint)(pixels)
    failed: list[str] = []
    for runtime in runtimes:
        for precision in PRECISIONS:
            engine = make_engine(small, precision, runtime)
            first, second = engine(pixels).logits, engine(pixels).logits
            check(len(first) == len(pixels), f"{len(first)} of {len(pixels)} images came out")
            top1, difference, passed = agreement(precision, first, reference)
            same = np.array_equal(first, second)
            row = {"runtime": runtime, "precision": precision, "images": len(pixels)}
            row |= {"same_top_class": top1, "max_logit_difference": difference}
            report(row | {"repeatable": same, "passed": passed and same})
            if not (passed and same):
                failed.append(f"{runtime} {precision}")
    check(not failed, f"not as transformers, or not repeatable: {', '.join(failed)}")


def check_memory(settings: Row, report: Report) -> None:
    """Checks that engine and decoder lose no image when the memory of the GPU is nearly full."""
    require_gpu(settings)
    total = torch.cuda.get_device_properties(0).total_memory
    pixels = random_pixels(settings, 512)
    expected = make_engine(settings, "fp32", batch_size=16)(pixels).logits
    enough = torch.cuda.max_memory_reserved()  # for batches of 16 images
    torch.cuda.empty_cache()
    # Without a warm-up, which would already lower the batch size.
    engine = make_engine(settings, "fp32", is_warm=False, batch_size=512)
    with _limited_memory(min(total, 2 * enough), total):
        logits = engine(pixels).logits
    difference = float(np.abs(logits - expected).max())
    report(
        {"part": "engine", "images": len(logits), "batch_size": engine.batch_size, "difference": difference}
    )
    check(len(logits) == len(pixels), f"{len(logits)} of {len(pixels)} images came out")
    check(engine.batch_size < 512, "the memory was not full: the batch size is still 512")
    check(difference <= _MAX_ROUNDING, f"logits differ by {difference:.2g}")
    del engine
    decoder = gpu_decoder(settings)
    torch.cuda.empty_cache()
    [chunk] = chunks_of(read_tars(settings["tars"])[:64])
    with _limited_memory(torch.cuda.memory_reserved() + 1024**2, total):
        done = decoder(chunk)
    expected_chunk = decode_chunk(chunk, decode_options(settings))
    check(done.samples.equals(expected_chunk.samples), "the decoder lost images or sizes")
    check(len(done.pixels) == len(expected_chunk.pixels), "the decoder lost pixels")  # type: ignore[arg-type]
    report({"part": "decoder", "images": len(done.samples), "on_cpu": isinstance(done.pixels, np.ndarray)})


@contextmanager
def _limited_memory(size: int, total: int) -> Iterator[None]:
    """Limits the memory that PyTorch allocates on the GPU, in bytes."""
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def check_streams(settings: Row, report: Report) -> None:
    """Checks that concurrent calls of engine and decoder give the same bits as single calls."""
    on_gpu = settings["device"] == "cuda"
    precision, count = ("bf16", 300) if on_gpu else ("fp32", 20)
    engine = make_engine(settings, precision, batch_size=64)
    inputs: list[Any] = [random_pixels(settings, count)[::step] for step in (1, 2, 3, 1)]
    if on_gpu:
        inputs += [torch.from_numpy(np.ascontiguousarray(each)).to("cuda") for each in inputs]
    _compare_concurrent(report, "engine", lambda images: engine(images).logits, inputs)
    decoder = gpu_decoder(settings)
    images = read_tars(settings["tars"])
    parts = [chunk for start in (0, 100, 200, 50) for chunk in chunks_of(images[start : start + 150])]

    def classify(chunk: Chunk) -> np.ndarray:
        pixels = decoder(chunk).pixels
        assert pixels is not None
        return engine(pixels).logits

    _compare_concurrent(report, "decoder and engine", classify, parts)


def _compare_concurrent(
    report: Report, part: str, call: Callable[[Any], np.ndarray], inputs: Sequence[Any]
) -> None:
    expected = [call(each) for each in inputs]
    rounds = 3
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, [*inputs] * rounds))
    different = sum(
        not np.array_equal(a, b) for a, b in zip(found, chain.from_iterable([expected] * rounds), strict=True)
    )
    report({"part": part, "calls": len(found), "different": different})
    check(different == 0, f"{part}: {different} of {len(found)} concurrent calls gave other bits")


def check_graphs(settings: Row, report: Report) -> None:
    """Checks the compiled engine, which uses CUDA graphs on a GPU, and measures it by precision."""
    require_gpu(settings)
    check_precisions(settings, report, ["compile"])
    pixels = random_pixels(settings, 8 * settings["batch_size"])
    for precision in BY_IMPORTANCE:
        engine = make_engine(settings, precision, "compile")
        name = "engine, compiled, CUDA graphs"
        measure_classifier(report, name, precision, lambda x, e=engine: e(x).logits, pixels)  # type: ignore[misc]
        parts = [pixels[:1], pixels[:7], pixels[: settings["batch_size"] + 1], pixels[3:50]]
        _compare_concurrent(report, f"compiled, {precision}", lambda x, e=engine: e(x).logits, parts)  # type: ignore[misc]
