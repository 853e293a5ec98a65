"""Compares image decoders with transformers' processor: `cvt-label benchmark decoding --images URI`."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
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
from jobs import console
from jobs.benchmarks import figures
from jobs.reference import MAX_PIXELS, load_model, read_images
from pipeline.decode import DecodeOptions, decode
from pipeline.decode.gpu import GpuDecoder
from pipeline.read import Sample, split_into_chunks

EXACT, TRANSFORMERS = "decode", "transformers' processor"

#: Maps n encoded images to inputs of the model, in any form that `to_pixels` accepts.
Decoder = Callable[[Sequence[bytes]], Sequence[Any]]


def decoding(
    context: typer.Context,
    images: console.ImagesOption,
    model: console.ModelOption = "cvt-13",
    size: console.SizeOption = None,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="Maximum number of images.")] = 200,
    rounds: figures.RoundsOption = 3,
    device: figures.DeviceOption = "auto",
    output: figures.OutputOption = None,
) -> None:
    """Compare the speed of decoding with that of transformers.

    Measures each decoder on one thread, and the differences of pixels and labels from exact decoding.

    More exit statuses: 1 if a decoder lost an image.
    """
    checkpoint = load_model(model, size)
    encoded = [data for data, _ in itertools.islice(read_images(images, checkpoint.preprocessor), count)]
    decoders = available_decoders(checkpoint.preprocessor)
    figures.print_results(
        context, output, decoding=compare_decoders(encoded, decoders, checkpoint, device, rounds)
    )


def compare_decoders(
    images: list[bytes], decoders: Mapping[str, Decoder], checkpoint: Checkpoint, device: str, rounds: int
) -> list[dict[str, Any]]:
    """Compares the decoders, which include `EXACT` and `TRANSFORMERS`.

    Returns:
        The figures of each decoder. Pixels and labels are compared with those of exact decoding. Differences
        are means over an image, in gray levels.

    Raises:
        BenchmarkError: a decoder lost an image.
    """
    rows = figures.compare_rates(decoders, images, rounds, TRANSFORMERS)
    engine = Engine(checkpoint.model, checkpoint.preprocessor, device=device)
    exact = to_pixels(decoders[EXACT](images), checkpoint.preprocessor)
    labels = engine(exact).logits.argmax(1)
    for row in rows:
        pixels = to_pixels(decoders[row["variant"]](images), checkpoint.preprocessor)
        differences = np.abs(pixels.astype(np.int16) - exact).mean((1, 2, 3))
        row["same_label"] = float((engine(pixels).logits.argmax(1) == labels).mean())
        row["mean_difference"] = float(differences.mean())
        row["max_image_difference"] = float(differences.max())
    return rows


def available_decoders(preprocessor: Preprocessor) -> dict[str, Decoder]:
    """Returns the decoders that this machine supports, by name."""
    processor = transformers.ConvNextImageProcessorPil(**preprocessor.to_dict())
    decoders: dict[str, Decoder] = {
        EXACT: partial(decode_on_cpu, preprocessor),
        "decode, fast": partial(decode_on_cpu, preprocessor, fast=True),
        TRANSFORMERS: partial(decode_with_transformers, processor),
    }
    if torch.cuda.is_available():
        try:
            decoder = GpuDecoder(DecodeOptions(preprocessor, MAX_PIXELS), "cuda")
        except (ImportError, ValueError) as error:
            console.print_notice(f"the GPU: skipped: {error}")
        else:
            decoders["the GPU"] = partial(decode_on_gpu, decoder)
    return decoders


def decode_on_cpu(preprocessor: Preprocessor, images: Sequence[bytes], fast: bool = False) -> Sequence[Any]:
    """Decodes and preprocesses on the CPU."""
    options = DecodeOptions(preprocessor, MAX_PIXELS, fast)
    decoded = [decode(data, options).pixels for data in images]
    return [pixels for pixels in decoded if pixels is not None]


def decode_with_transformers(processor: Any, images: Sequence[bytes]) -> Sequence[Any]:
    """Decodes with Pillow and preprocesses with transformers, on the CPU."""
    opened = (Image.open(io.BytesIO(data)).convert("RGB") for data in images)
    return [processor(image, return_tensors="pt").pixel_values[0] for image in opened]


def decode_on_gpu(decoder: GpuDecoder, images: Sequence[bytes], chunk_images: int = 256) -> Sequence[Any]:
    """Decodes and preprocesses on the GPU, one chunk at a time."""
    samples = (Sample(str(number), data) for number, data in enumerate(images))
    chunks = split_into_chunks(samples, 0, chunk_images, 128 * 1024**2)
    found: list[Any] = []
    for chunk in chunks:
        pixels = decoder(chunk).pixels
        assert pixels is not None
        found += pixels
    return found


def to_pixels(inputs: Sequence[Any], preprocessor: Preprocessor) -> np.ndarray:
    """Converts inputs of the model to the format of exact decoding: uint8 (n, size, size, 3)."""
    array = torch.stack([torch.as_tensor(each).cpu() for each in inputs]).numpy()
    if array.dtype == np.uint8:
        return array
    scaled = array.transpose(0, 2, 3, 1) * np.array(preprocessor.std) + np.array(preprocessor.mean)
    return np.asarray((scaled / preprocessor.rescale_factor).round(), np.uint8)
