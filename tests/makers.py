"""Makers of test inputs: images, tars and Parquet files as bytes."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline import read
from pipeline.config import InputConfig
from pipeline.predictions import ErrorCategory
from pipeline.storage import Storage


def list_shards(
    storage: Storage, uri: str | list[str], format: str = "auto", **fields: Any
) -> read.ShardListing:
    """Lists the shards of an input with these fields of its configuration."""
    return read.list_shards(storage, InputConfig(uri=uri, format=format, **fields))


def make_image(seed: int = 0, size: tuple[int, int] = (32, 24), format: str = "JPEG") -> bytes:
    """Returns a small valid image whose pixels depend on `seed`."""
    image = Image.new("RGB", size, (seed * 37 % 256, seed * 101 % 256, seed * 13 % 256))
    image.putpixel((seed % size[0], 0), (255, 255, 255))
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


def make_tar(members: Iterable[tuple[str, bytes]] | Mapping[str, bytes]) -> bytes:
    """Returns a tar of these members in order; a name may occur several times."""
    pairs = members.items() if isinstance(members, Mapping) else members
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def make_tar_gz(members: Iterable[tuple[str, bytes]] | Mapping[str, bytes]) -> bytes:
    """Returns a gzipped tar of these members in order."""
    return gzip.compress(make_tar(members), mtime=0)


def make_samples(count: int, labels: bool = True) -> list[tuple[str, bytes]]:
    """Returns members of a WebDataset tar: `00000.jpg`, `00000.cls` and so on. The class is the number."""
    members = []
    for i in range(count):
        members.append((f"{i:05d}.jpg", make_image(i)))
        if labels:
            members.append((f"{i:05d}.cls", str(i).encode()))
    return members


def category_of(error: str | None) -> ErrorCategory:
    """Returns the category of a sample's error, which must be `<category>: <detail>`."""
    category, separator, detail = (error or "").partition(": ")
    assert separator
    assert detail
    return ErrorCategory(category)


def make_parquet(
    columns: Mapping[str, Any], metadata: Mapping[str, str] | None = None, **options: Any
) -> bytes:
    """Returns a Parquet file of these columns (lists or Arrow arrays); `options` are for `pq.write_table`."""
    stream = io.BytesIO()
    pq.write_table(pa.table(dict(columns), metadata=metadata), stream, **options)
    return stream.getvalue()
