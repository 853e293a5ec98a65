"""What the benchmark measures: this package's ways and others', each checked for how many images came out.

They run in turn, on one machine, on the same images and weights. What counts are the ratios: they hold
where the machine's speed drifts.
"""

from __future__ import annotations

import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from cvt.engine import Engine
from cvt.modeling import CvtForImageClassification
from cvt.preprocessing import Preprocessor
from cvt.presets import PRESETS, preset_config, preset_preprocessor
from jobs.console import err
from jobs.model_contenders import normalise, to_transformers
from pipeline.cluster import ray_cluster
from pipeline.committing import Progress
from pipeline.config import Config, ConfigError, InputConfig, load_config
from pipeline.decoding import decode
from pipeline.labelling import Plan, input_shards, run_labelling
from pipeline.partition import read_options
from pipeline.planning import Selection
from pipeline.reading import read_samples
from pipeline.storage import Storage
from pipeline.training import Subject, save_model

#: A way of doing something: called, it returns how many images came out, and in which time.
Way = Callable[[], tuple[int, float]]


class WrongCountError(RuntimeError):
    """Something lost images, or made some up: then its speed is none."""


@dataclass(frozen=True)
class Measurement:
    """One way of doing one thing: what it is, and its images/s in each round."""

    name: str
    images: int
    rates: list[float]


@dataclass(frozen=True)
class Ratio:
    """How one way compares to another, round by round, since the two were measured in turn."""

    name: str
    rounds: list[float]


@dataclass(frozen=True)
class Subjects:
    """What everything is measured on: images as they lie, decoded, and a model with random weights."""

    uri: str
    encoded: list[bytes]
    pixels: np.ndarray
    subject: Subject
    batch_size: int


def load_subjects(uri: str, count: int, batch_size: int, size: int) -> Subjects:
    """Reads the images at `uri`, decodes `count` of them, and makes a CvT-13 for `size` pixels."""
    subject = random_subject("cvt-13", size)
    encoded = list(_read(uri))
    return Subjects(uri, encoded, _decoded(encoded[:count], subject.preprocessor), subject, batch_size)


def random_subject(name: str, size: int) -> Subject:
    """A published variant with random weights, for images of `size` pixels.

    Raises:
        ConfigError: there is no such variant.
    """
    if name not in PRESETS:
        raise ConfigError(f"--model: {name!r} is none of {', '.join(PRESETS)}")
    torch.manual_seed(0)
    labels = {i: f"class {i}" for i in range(1000)}
    model = CvtForImageClassification(preset_config(name, id2label=labels)).eval()
    return Subject(model, preset_preprocessor(size))


def load_images(uri: str, preprocessor: Preprocessor, count: int) -> np.ndarray:
    """The first images at `uri`, decoded: uint8 (count, size, size, 3); fewer, if there are fewer.

    Raises:
        StorageError, NoShardsError: they can't be read.
    """
    return _decoded(list(itertools.islice(_read(uri), count)), preprocessor)


def _read(uri: str) -> Iterator[bytes]:
    section = InputConfig(uri=uri, labels=False)
    storage = Storage()
    for shard in input_shards(storage, section):
        for sample in read_samples(storage, shard, read_options(section, [])):
            if sample.image is not None:
                yield sample.image


def _decoded(encoded: list[bytes], preprocessor: Preprocessor) -> np.ndarray:
    decoded = [decode(data, preprocessor, 10**9).pixels for data in encoded]
    return np.stack([pixels for pixels in decoded if pixels is not None])


def decoding(subjects: Subjects, rounds: int) -> list[Measurement]:
    """From encoded images to the model's input, on one thread."""
    preprocessor = subjects.subject.preprocessor
    processor = transformers.ConvNextImageProcessorPil(**preprocessor.to_dict())

    def mine() -> int:
        return sum(decode(data, preprocessor, 10**9).pixels is not None for data in subjects.encoded)

    def theirs() -> int:
        done = 0
        for data in subjects.encoded:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            done += len(processor(image, return_tensors="pt").pixel_values)
        return done

    ways = {"decode": _timed(mine), "decode, transformers' processor": _timed(theirs)}
    return _in_turn(ways, len(subjects.encoded), rounds)


def model(subjects: Subjects, rounds: int) -> list[Measurement]:
    """From the model's input to logits; and transformers' pipeline, from encoded images to labels."""
    subject, pixels = subjects.subject, subjects.pixels
    engine = Engine(subject.model, subject.preprocessor, device="cpu", batch_size=subjects.batch_size)
    reference = to_transformers(subject.model)
    processor = transformers.ConvNextImageProcessorPil(**subject.preprocessor.to_dict())
    normalised = normalise(pixels, subject.preprocessor)
    whole = transformers.pipeline("image-classification", model=reference, image_processor=processor)

    def eager() -> int:
        with torch.inference_mode():
            return sum(len(reference(batch).logits) for batch in normalised.split(subjects.batch_size))

    def pipeline() -> int:
        # Opened anew each time: an image that was decoded once stays so.
        images = [Image.open(io.BytesIO(data)) for data in subjects.encoded[: len(pixels)]]
        return len(whole(images, batch_size=subjects.batch_size))

    ways = {
        "engine": _timed(lambda: len(engine(pixels).logits)),
        "model, transformers eager": _timed(eager),
        "pipeline, transformers image-classification": _timed(pipeline),
    }
    return _in_turn(ways, len(pixels), rounds)


def pipeline(subjects: Subjects, rounds: int) -> list[Measurement]:
    """The whole job, and a bare loop over the same engine that has its images decoded already."""
    subject, pixels = subjects.subject, subjects.pixels
    engine = Engine(subject.model, subject.preprocessor, device="cpu", batch_size=subjects.batch_size)
    with tempfile.TemporaryDirectory() as folder, ray_cluster(None):
        save_model(subject, Path(folder) / "cvt-13")
        settings = {
            "input.uri": subjects.uri,
            "input.labels": "false",
            "model.path": f"{folder}/cvt-13",
            "output.uri": f"{folder}/labels",
            "read.chunk_images": "64",
            "classify.device": "cpu",
            "classify.batch_size": str(subjects.batch_size),
        }
        config = load_config(Config, None, [f"{name}={value}" for name, value in settings.items()])
        whole = _in_turn(
            {
                "bare loop over the engine": _timed(lambda: len(engine(pixels).logits)),
                "pipeline, steady state": lambda: _label(config, len(subjects.encoded)),
            },
            None,
            rounds,
        )
    return whole


def _label(config: Config, expected: int) -> tuple[int, float]:
    """Runs the whole job; returns the images and seconds between its first and last results."""
    seen: list[tuple[int, float]] = []

    def note(progress: Progress, plan: Plan) -> None:
        seen.append((progress.images, time.perf_counter()))

    result = run_labelling(config, note, Selection(relabel=True))
    if (result.totals.images, result.totals.errors) != (expected, 0):
        raise WrongCountError(f"the pipeline labelled {result.totals.images} images of {expected}")
    (first, start), *_ = seen
    last, end = next((images, at) for images, at in seen if images == expected)
    if last == first:
        raise WrongCountError("too few images for a steady state: all came out at once")
    return last - first, end - start


def _timed(way: Callable[[], int]) -> Way:
    def timed() -> tuple[int, float]:
        start = time.perf_counter()
        images = way()
        return images, time.perf_counter() - start

    return timed


def _in_turn(ways: Mapping[str, Way], expected: int | None, rounds: int) -> list[Measurement]:
    """Measures each way in each round, after one round that doesn't count.

    Raises:
        WrongCountError: a way gave another number of images than `expected`.
    """
    measured = {name: Measurement(name, 0, []) for name in ways}
    counts: dict[str, int] = {}
    for turn, (name, way) in itertools.product(range(rounds + 1), ways.items()):
        err.print(f"{name}: {f'round {turn} of {rounds}' if turn else 'warm-up'}", highlight=False)
        images, seconds = way()
        if expected is not None and images != expected:
            raise WrongCountError(f"{name}: {images} images came out of {expected}")
        counts[name] = images
        if turn:
            measured[name].rates.append(images / seconds)
    return [Measurement(name, counts[name], m.rates) for name, m in measured.items()]


def ratios(measured: Mapping[str, Measurement]) -> list[Ratio]:
    """How this package's ways compare to the others."""
    pairs = [
        ("decode", "decode, transformers' processor"),
        ("engine", "model, transformers eager"),
        ("engine", "pipeline, transformers image-classification"),
        ("pipeline, steady state", "bare loop over the engine"),
    ]
    return [
        Ratio(
            f"{one} / {other}",
            [a / b for a, b in zip(measured[one].rates, measured[other].rates, strict=True)],
        )
        for one, other in pairs
    ]
