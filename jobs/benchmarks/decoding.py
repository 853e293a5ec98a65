"""Ways to decode and preprocess images, against transformers' processor: `cvt-label benchmark --decode-only`.

How fast each is, and how its pixels and labels differ from those of exact decoding.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image

from cvt.inference import Engine
from cvt.preprocessing import Preprocessor
from jobs.benchmarks.contenders import WrongCountError
from jobs.benchmarks.data import MAX_PIXELS, read_images
from pipeline.decode import decode
from pipeline.decode.gpu import GpuDecoder
from pipeline.read import NoShardsError, Sample, cut_into_chunks
from pipeline.train import TrainingModel

#: Pixels to which images are enlarged.
LARGE = 2_000_000


EXACT = "decode"

THEIRS = "transformers' processor"


_GPU_CHUNK_IMAGES, _GPU_CHUNK_BYTES = 256, 128 * 1024**2


@dataclass(frozen=True)
class Decoding:
    """One way to decode, on one thread.

    Attributes:
        images: which: "as they are", or enlarged.
        count: how many.
        way: what decodes.
        rates: images/s, a round each.
        ratios: of it to transformers' processor, a round each.
        same_label: share of the images that get the same label as from exact decoding.
        mean_difference: from exact decoding, in grey levels; the mean over all images.
        worst_difference: likewise, of the image that differs most.
    """

    images: str
    count: int
    way: str
    rates: list[float]
    ratios: list[float]
    same_label: float
    mean_difference: float
    worst_difference: float


class Way(NamedTuple):
    """A way to decode.

    Attributes:
        run: encoded images to the model's input, whatever form that has here.
        pixels: that form as exact decoding has it, uint8 (size, size, 3).
    """

    run: Callable[[Iterable[bytes]], Iterator[Any]]
    pixels: Callable[[Any], np.ndarray]


def compare_decoding(
    encoded: list[bytes], subject: TrainingModel, device: str, rounds: int, note: Callable[[str], None]
) -> list[Decoding]:
    """From encoded images to the model's input: this package and transformers' processor, in turn.

    Args:
        encoded: images.
        subject: what is done, and the model that says whether labels differ.
        device: of the model.
        rounds: times that each is measured, after one that doesn't count.
        note: told what is measured now.

    Raises:
        WrongCountError: a way lost an image.
    """
    groups = {
        "as they are": encoded,
        f"enlarged to {LARGE / 1e6:g} megapixels, JPEG quality 90": [enlarged(data) for data in encoded],
    }
    ways = decoders(subject.preprocessor, note)
    engine = Engine(subject.model, subject.preprocessor, device=device)
    found = []
    for group, images in groups.items():
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn, (name, way) in itertools.product(range(rounds + 1), ways.items()):
            note(f"{name}, images {group}: {f'round {turn} of {rounds}' if turn else 'warm-up'}")
            rate = _rate(name, way, images)
            if turn:
                rates[name].append(rate)
        note(f"labels of images {group}")
        exact = _pixels(ways[EXACT], images)
        labels = _labels(engine, exact)
        for name, way in ways.items():
            pixels = _pixels(way, images)
            ratios = [mine / theirs for mine, theirs in zip(rates[name], rates[THEIRS], strict=True)]
            same = float((_labels(engine, pixels) == labels).mean())
            found.append(
                Decoding(group, len(images), name, rates[name], ratios, same, *grey_levels(pixels, exact))
            )
    return found


def _rate(name: str, way: Way, images: list[bytes]) -> float:
    start = time.perf_counter()
    done = sum(1 for _ in way.run(images))
    seconds = time.perf_counter() - start
    if done != len(images):
        raise WrongCountError(f"{name}: {done} images came out of {len(images)}")
    return done / seconds


def _pixels(way: Way, images: list[bytes]) -> np.ndarray:
    return np.stack([way.pixels(one) for one in way.run(images)])


def _labels(engine: Engine, pixels: np.ndarray) -> np.ndarray:
    labels: np.ndarray = engine(pixels).logits.argmax(1)
    return labels


def grey_levels(found: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """By how much images, uint8 (n, size, size, 3), differ: the mean of all, and of the worst image."""
    each = [np.abs(a.astype(np.int16) - b).mean() for a, b in zip(found, exact, strict=True)]
    return float(np.mean(each)), float(np.max(each))


def decoders(preprocessor: Preprocessor, note: Callable[[str], None]) -> dict[str, Way]:
    """The ways to decode that there are on this machine, by name."""
    ways = {
        EXACT: _by_this_package(preprocessor),
        "decode, fast": _by_this_package(preprocessor, fast=True),
        THEIRS: _by_transformers(preprocessor),
    }
    if torch.cuda.is_available():
        try:
            ways["the GPU"] = by_gpu(GpuDecoder(preprocessor, MAX_PIXELS, torch.device("cuda")))
        except (ImportError, ValueError) as error:
            note(f"not measured: {error}")
    return ways


def _by_this_package(preprocessor: Preprocessor, **options: Any) -> Way:
    def run(images: Iterable[bytes]) -> Iterator[np.ndarray]:
        for data in images:
            pixels = decode(data, preprocessor, MAX_PIXELS, **options).pixels
            if pixels is not None:
                yield pixels

    return Way(run, lambda pixels: pixels)


def _by_transformers(preprocessor: Preprocessor) -> Way:
    processor = transformers.ConvNextImageProcessorPil(**preprocessor.to_dict())
    mean, std = np.array(preprocessor.mean), np.array(preprocessor.std)

    def run(images: Iterable[bytes]) -> Iterator[torch.Tensor]:
        for data in images:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            yield from processor(image, return_tensors="pt").pixel_values

    def pixels(values: torch.Tensor) -> np.ndarray:
        grey = (values.permute(1, 2, 0).numpy() * std + mean) / preprocessor.rescale_factor
        rounded: np.ndarray = grey.round().astype(np.uint8)
        return rounded

    return Way(run, pixels)


def by_gpu(decoder: GpuDecoder) -> Way:
    """As the pipeline does it with `decode.device: gpu`, a chunk at a time."""

    def run(images: Iterable[bytes]) -> Iterator[torch.Tensor | np.ndarray]:
        samples = (Sample(str(number), data) for number, data in enumerate(images))
        for chunk in cut_into_chunks(samples, 0, _GPU_CHUNK_IMAGES, _GPU_CHUNK_BYTES):
            pixels = decoder(chunk).pixels  # an array, if the GPU has no memory for them
            assert pixels is not None
            yield from pixels

    return Way(run, lambda pixels: torch.as_tensor(pixels).cpu().numpy())


def enlarged(data: bytes) -> bytes:
    """An image of at least `LARGE` pixels, as JPEG; as it is, if it has that many."""
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    if width * height >= LARGE:
        return data
    factor = next(n for n in itertools.count(2) if width * height * n * n >= LARGE)
    larger = image.convert("RGB").resize((width * factor, height * factor), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    larger.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def take_images(uri: str, preprocessor: Preprocessor, count: int | None) -> list[bytes]:
    """The first images at `uri` that can be decoded; all of them if no count is given.

    Raises:
        StorageError, NoShardsError: they can't be read, or there are none.
    """
    good = (data for data in read_images(uri) if decode(data, preprocessor, MAX_PIXELS).pixels is not None)
    found = list(itertools.islice(good, count))
    if not found:
        raise NoShardsError(f"{uri}: no image that can be decoded")
    return found
