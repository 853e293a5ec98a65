"""What the benchmarks measure with: models, images, and tars that every contender labels."""

from __future__ import annotations

import io
import itertools
import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cvt.modeling import CvtForImageClassification
from cvt.preprocessing import Preprocessor
from cvt.presets import PRESETS, preset_config, preset_preprocessor
from pipeline.classify.checkpoint import open_checkpoint
from pipeline.config import ConfigError, InputConfig
from pipeline.decode import FORMATS, decode
from pipeline.read import NoShardsError, ReadOptions, input_shards, read_samples
from pipeline.storage import Storage
from pipeline.train import TrainingModel

#: Of an image that a benchmark decodes: there is no larger one that is to be refused.
MAX_PIXELS = 10**9


# At the most in a shard: two chunks of the smallest models, and what fits into a PUT with ease.
_SHARD_IMAGES = 8192

_SHARD_BYTES = 10**9

_SHARDS_A_CORE = 2  # at the least, so that work can be spread evenly

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WebP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}


def random_subject(name: str, size: int) -> TrainingModel:
    """A published variant with random weights, for images of `size` pixels.

    Raises:
        ConfigError: there is no such variant.
    """
    if name not in PRESETS:
        raise ConfigError(f"--model: {name!r} is none of {', '.join(PRESETS)}")
    torch.manual_seed(0)
    labels = {i: f"class {i}" for i in range(1000)}
    model = CvtForImageClassification(preset_config(name, id2label=labels)).eval()
    return TrainingModel(model, preset_preprocessor(size))


def load_subject(model: str, size: int | None) -> TrainingModel:
    """A published variant with random weights, or a checkpoint as `model.path` takes them.

    Raises:
        ConfigError: a size is given for a checkpoint, which has its own.
        CheckpointError, StorageError: the checkpoint can't be loaded.
    """
    if model in PRESETS:
        return random_subject(model, size or 224)
    if size is not None:
        raise ConfigError(f"--size: is for {', '.join(PRESETS)}; {model} has a size of its own")
    checkpoint = open_checkpoint(Storage(), model)
    return TrainingModel(checkpoint.model, checkpoint.preprocessor)


def load_images(uri: str, preprocessor: Preprocessor, count: int) -> np.ndarray:
    """The first images at `uri`, decoded: uint8 (count, size, size, 3); fewer, if there are fewer.

    Raises:
        StorageError, NoShardsError: they can't be read.
    """
    encoded = itertools.islice(read_images(uri), count)
    decoded = [decode(data, preprocessor, MAX_PIXELS).pixels for data in encoded]
    return np.stack([pixels for pixels in decoded if pixels is not None])


def read_images(uri: str) -> Iterator[bytes]:
    """The encoded images of shards, in their order; samples without one are passed over."""
    section = InputConfig(uri=uri, labels=False)
    storage = Storage()
    for shard in input_shards(storage, section):
        for sample in read_samples(storage, shard, ReadOptions.of(section, [])):
            if sample.image is not None:
                yield sample.image


@dataclass(frozen=True)
class Dataset:
    """The input of every contender.

    Attributes:
        tars: folder with the shards.
        files: folder with the same images in files of their own; empty unless `unpack` was called.
        images: how many; their keys are the numbers from 0, with nine digits.
        shards: tars that hold them.
        bytes: of the encoded images, in all.
        distinct: how many there were, before they were repeated.
        left_out: images of the source that can't be decoded.
        extension: of every image.
    """

    tars: Path
    files: Path
    images: int
    shards: int
    bytes: int
    distinct: int
    left_out: int
    extension: str

    def unpack(self) -> None:
        """Writes the images into files of their own."""
        self.files.mkdir(exist_ok=True)
        for path in sorted(self.tars.iterdir()):
            with tarfile.open(path) as tar:
                tar.extractall(self.files, filter="data")


def make_dataset(uri: str, folder: Path, samples: int | None, cores: int) -> Dataset:
    """Packs the images at `uri`, whatever format their shards have, as tars of an equal number of images.

    Their bytes stay as they are. What can't be decoded is left out: peers stop at it.

    Args:
        uri: shards.
        folder: for the tars; it exists.
        samples: images to take, over and over if there are fewer; None takes each once.
        cores: CPUs among which the shards are to be spread.

    Raises:
        StorageError, NoShardsError: the images can't be read, or there are none.
    """
    source = _survey(uri, samples)
    wanted = samples or source.good
    shards = shard_count(wanted, math.ceil(source.bytes * wanted / source.good), cores)
    tars = folder / "tars"
    tars.mkdir()
    images = enumerate(itertools.islice(_repeated(uri, source.bad), wanted))
    size = 0
    for shard in range(shards):
        count = wanted * (shard + 1) // shards - wanted * shard // shards
        with tarfile.open(tars / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, data in itertools.islice(images, count):
                member = tarfile.TarInfo(f"{number:09d}.{source.extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                size += len(data)
    distinct = min(source.good, wanted)
    return Dataset(tars, folder / "files", wanted, shards, size, distinct, len(source.bad), source.extension)


def shard_count(images: int, size: int, cores: int) -> int:
    """Tars for so many images, of `size` bytes in all: few and large, but some for each core."""
    fitting = max(math.ceil(images / _SHARD_IMAGES), math.ceil(size / _SHARD_BYTES))
    return min(images, max(fitting, _SHARDS_A_CORE * cores))


class _Source(NamedTuple):
    """Images as they are found: how many are good, their bytes, the places of the bad, and an extension."""

    good: int
    bytes: int
    bad: set[int]
    extension: str


def _survey(uri: str, samples: int | None) -> _Source:
    """Looks at images until there are as many good ones as `samples`, at all if None."""
    preprocessor = preset_preprocessor(224)
    good, size, extension = 0, 0, ""
    bad: set[int] = set()
    for number, data in enumerate(read_images(uri)):
        if decode(data, preprocessor, MAX_PIXELS).pixels is None:
            bad.add(number)
            continue
        good += 1
        size += len(data)
        # One for all, since some readers make a column of each; they go by the bytes.
        extension = extension or next(_EXTENSIONS[name] for name, start, _ in FORMATS if start.match(data))
        if good == samples:
            break
    if good == 0:
        raise NoShardsError(f"{uri}: no image that can be decoded")
    return _Source(good, size, bad, extension)


def _repeated(uri: str, bad: set[int]) -> Iterator[bytes]:
    while True:
        yield from (data for number, data in enumerate(read_images(uri)) if number not in bad)
