"""The input of the end-to-end benchmark: tars that every contender labels."""

from __future__ import annotations

import io
import itertools
import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cvt.preprocessing import Preprocessor
from jobs.benchmarks.contenders import EXTENSION
from jobs.verify import MAX_PIXELS, read_images
from pipeline.decode import decode
from pipeline.read import NoShardsError

_SHARD_IMAGES = 8192  # maximum
_SHARDS_PER_CORE = 2  # minimum


@dataclass
class Dataset:
    """The input of every contender; keys are the numbers from 0, with nine digits.

    Attributes:
        distinct: number of images before they are repeated.
        left_out: number of images of the source that cannot be decoded.
    """

    images: int = 0
    distinct: int = 0
    left_out: int = 0
    shards: int = 0
    bytes: int = 0


def make_dataset(uri: str, tars: Path, preprocessor: Preprocessor, samples: int, cores: int) -> Dataset:
    """Packs images of any shard format into tars, byte for byte.

    Images that cannot be decoded are left out, because other contenders stop at them.

    Args:
        uri: shards.
        tars: folder for the tars; it does not exist.
        preprocessor: decides whether an image can be decoded.
        samples: number of images; they are repeated if there are fewer.
        cores: number of CPUs that share the tars.

    Raises:
        StorageError, NoShardsError: the images cannot be read, or there are none.
    """
    dataset = Dataset()
    tars.mkdir()
    shard_images = min(_SHARD_IMAGES, math.ceil(samples / (_SHARDS_PER_CORE * cores)))
    images = itertools.islice(_repeated(uri, preprocessor, dataset), samples)
    while dataset.images < samples:
        with tarfile.open(tars / f"{dataset.shards:05d}.tar", "w") as tar:
            for data in itertools.islice(images, shard_images):
                member = tarfile.TarInfo(f"{dataset.images:09d}.{EXTENSION}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                dataset.images += 1
                dataset.bytes += len(data)
        dataset.shards += 1
    return dataset


def unpack(tars: Path, files: Path) -> None:
    """Writes the images of tars into single files."""
    for path in sorted(tars.iterdir()):
        with tarfile.open(path) as tar:
            tar.extractall(files, filter="data")


def _repeated(uri: str, preprocessor: Preprocessor, dataset: Dataset) -> Iterator[bytes]:
    """Yields the images that can be decoded, endlessly; counts them in `dataset` the first time."""
    broken = set()
    for number, data in enumerate(read_images(uri)):
        if decode(data, preprocessor, MAX_PIXELS).pixels is None:
            dataset.left_out += 1
            broken.add(number)
        else:
            dataset.distinct += 1
            yield data
    if not dataset.distinct:
        raise NoShardsError(f"{uri}: no image that can be decoded")
    while True:
        yield from (data for number, data in enumerate(read_images(uri)) if number not in broken)
