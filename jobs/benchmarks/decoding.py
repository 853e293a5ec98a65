"""Decoding and preprocessing against transformers' processor: `cvt-label benchmark decoding --images URI`."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from PIL import Image

from cvt.checkpoints import Checkpoint
from cvt.inference import Engine
from cvt.preprocessing import Preprocessor
from jobs.benchmarks import figures
from jobs.console import exit_on_error, print_notice
from jobs.reference import MAX_PIXELS, load_model, read_images
from pipeline.decode import decode
from pipeline.decode.gpu import GpuDecoder
from pipeline.read import Sample, split_into_chunks

EXACT, THEIRS = "decode", "transformers' processor"

#: Encoded images in, the model's input out, in any form that `to_pixels` knows.
Decoder = Callable[[Iterable[bytes]], Iterator[Any]]


@dataclass
class Decoding:
    """The figures of one decoder on one thread; lists have one value per round.

    Attributes:
        to_transformers: images/s over those of transformers' processor.
        same_label: share of images with the same label as from exact decoding.
        gray_levels_off: mean difference from exact decoding.
        worst_image: the mean difference of the image that differs most.
    """

    decoder: str
    images_per_s: list[float] = field(default_factory=list)
    to_transformers: list[float] = field(default_factory=list)
    same_label: float = 0.0
    gray_levels_off: float = 0.0
    worst_image: float = 0.0


@exit_on_error()
def decoding(
    context: typer.Context,
    images: figures.Images,
    model: figures.Model = "cvt-13",
    size: figures.Size = None,
    count: Annotated[int, typer.Option(min=1, help="Maximum number of images.")] = 200,
    rounds: figures.Rounds = 3,
    device: figures.OnDevice = "auto",
    output: figures.Output = None,
) -> None:
    """Measure decoding on one thread against transformers' processor, and how pixels and labels differ.

    Exit status: 0; 1 if a decoder lost an image; 2 if an option is wrong; 4 if images or model are unusable.
    """
    checkpoint = load_model(model, size)
    encoded = [data for data, _ in itertools.islice(read_images(images, checkpoint.preprocessor), count)]
    decoders = available_decoders(checkpoint.preprocessor)
    figures.report(context, output, decoding=compare_decoders(encoded, decoders, checkpoint, device, rounds))


def compare_decoders(
    images: list[bytes], decoders: Mapping[str, Decoder], checkpoint: Checkpoint, device: str, rounds: int
) -> list[Decoding]:
    """Measures decoders in turn, `EXACT` and `THEIRS` among them, after a round that does not count.

    Raises:
        BenchmarkError: a decoder lost an image.
    """
    preprocessor = checkpoint.preprocessor
    engine = Engine(checkpoint.model, preprocessor, device=device)
    found = {name: Decoding(name) for name in decoders}
    for turn, (name, decoder) in itertools.product(range(rounds + 1), decoders.items()):
        print_notice(f"{name}: {f'round {turn} of {rounds}' if turn else 'warm-up'}")
        start = time.perf_counter()
        done = sum(1 for _ in decoder(images))
        if done != len(images):
            raise figures.BenchmarkError(f"{name}: {done} images came out of {len(images)}")
        if turn:
            found[name].images_per_s.append(done / (time.perf_counter() - start))
    exact = to_pixels(decoders[EXACT](images), preprocessor)
    labels = engine(exact).logits.argmax(1)
    for name, one in found.items():
        pixels = to_pixels(decoders[name](images), preprocessor)
        one.to_transformers = figures.ratios(one.images_per_s, found[THEIRS].images_per_s)
        one.same_label = float((engine(pixels).logits.argmax(1) == labels).mean())
        differences = np.abs(pixels.astype(np.int16) - exact).mean((1, 2, 3))
        one.gray_levels_off, one.worst_image = float(differences.mean()), float(differences.max())
    return list(found.values())


def available_decoders(preprocessor: Preprocessor) -> dict[str, Decoder]:
    """Returns the decoders of this machine by name."""
    decoders: dict[str, Decoder] = {
        EXACT: partial(by_this_package, preprocessor),
        "decode, fast": partial(by_this_package, preprocessor, fast=True),
        THEIRS: partial(by_transformers, transformers.ConvNextImageProcessorPil(**preprocessor.to_dict())),
    }
    if torch.cuda.is_available():
        try:
            decoders["the GPU"] = partial(by_gpu, GpuDecoder(preprocessor, MAX_PIXELS, torch.device("cuda")))
        except (ImportError, ValueError) as error:
            print_notice(f"not measured: {error}")
    return decoders


def by_this_package(preprocessor: Preprocessor, images: Iterable[bytes], fast: bool = False) -> Iterator[Any]:
    """Decodes and preprocesses on the CPU."""
    decoded = (decode(data, preprocessor, MAX_PIXELS, fast).pixels for data in images)
    return (pixels for pixels in decoded if pixels is not None)


def by_transformers(processor: Any, images: Iterable[bytes]) -> Iterator[Any]:
    """Decodes with Pillow and preprocesses with transformers, on the CPU."""
    for data in images:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        yield from processor(image, return_tensors="pt").pixel_values


def by_gpu(decoder: GpuDecoder, images: Iterable[bytes], chunk_images: int = 256) -> Iterator[Any]:
    """Decodes and preprocesses on the GPU, a chunk at a time."""
    samples = (Sample(str(number), data) for number, data in enumerate(images))
    for chunk in split_into_chunks(samples, 0, chunk_images, 128 * 1024**2):
        pixels = decoder(chunk).pixels
        assert pixels is not None
        yield from pixels


def to_pixels(inputs: Iterable[Any], preprocessor: Preprocessor) -> np.ndarray:
    """Returns inputs of the model as exact decoding has them: uint8 (n, size, size, 3)."""
    array = torch.stack([torch.as_tensor(each).cpu() for each in inputs]).numpy()
    if array.dtype == np.uint8:
        return array
    scaled = array.transpose(0, 2, 3, 1) * np.array(preprocessor.std) + np.array(preprocessor.mean)
    return np.asarray((scaled / preprocessor.rescale_factor).round(), np.uint8)
