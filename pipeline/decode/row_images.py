"""Opens the image that a row of the labels describes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from PIL import Image

from pipeline.config import Config, make_storage
from pipeline.decode.bounds import TIMEOUT_S, DecodeDeadline
from pipeline.decode.cpu import FORMATS
from pipeline.decode.plugins import REQUIREMENTS
from pipeline.decode.repair import END_OF_IMAGE, add_end, remove_metadata
from pipeline.read import ReadOptions, Sample, Shard, divide_files, read_images, read_samples
from pipeline.storage import ObjectInfo, Storage, is_under

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

#: The columns that locate an image, with their types.
_COLUMNS = {
    "shard": pa.string(), "index": pa.int64(), "uri": pa.string(), "version": pa.string(),
    "offset": pa.int64(), "size": pa.int64(),
}  # fmt: skip


def open_image(row: Mapping[str, Any], config: Config | None = None) -> ImageFile:
    """Opens the image of a row of the labels with Pillow.

    The image is not decoded yet, and not turned upright: see `PIL.ImageOps.exif_transpose`. One ranged read
    is enough for an image in an uncompressed tar, an image file, and an image of a table. In a compressed tar
    or a row group of a Parquet file, the samples before the image are read too.

    Args:
        row: the columns `shard`, `index`, `uri`, `version`, `offset` and `size` of a row, which is a
            dictionary or a row of a DataFrame, for example.
        config: the configuration of the job, for its storage, its limits and, in Parquet, its image column.
            Without a configuration, the storage is configured by the environment.

    Raises:
        KeyError: the row lacks a column.
        ValueError: the row has no image, or the image cannot be read or has changed.
        StorageError: the file of the image cannot be read; an `ObjectChanged`: the file has changed.
        ShardError: the shard cannot be read as far as the image.
    """
    data = read_image(row, config)
    plugins = (reader for name, pattern, reader in FORMATS if name in REQUIREMENTS and pattern.match(data))
    open_file = next(plugins, Image.open)
    if data.startswith(b"\xff\xd8") and END_OF_IMAGE not in data[-64:]:
        data = add_end(data, DecodeDeadline(TIMEOUT_S))
    try:
        return open_file(io.BytesIO(data))
    except ValueError:
        if not data.startswith(b"\x89PNG"):
            raise
        return open_file(io.BytesIO(remove_metadata(data)))  # Pillow refuses large metadata


def read_image(row: Mapping[str, Any], config: Config | None = None) -> bytes:
    """Returns the encoded image of a row; see `open_image`."""
    storage = Storage() if config is None else make_storage(config.storage)
    options = ReadOptions() if config is None else ReadOptions(config.input, config.read)
    # Pandas has NaN or NA for null, and floats for the integers of a column with nulls.
    row = {name: pa.scalar(row[name], kind, from_pandas=True).as_py() for name, kind in _COLUMNS.items()}
    uri, version, offset, size = row["uri"], row["version"], row["offset"], row["size"]
    if uri is None:
        raise ValueError(f"row {row['index']} of {row['shard']} has no URI, so it has no image")
    if offset is not None:
        with storage.open_unbuffered(uri, version) as file:
            file.seek(offset)
            return file.read(size) or b""
    if not is_under(row["shard"], uri):  # the image is an object of its own
        index, shard = 0, Shard(uri, version or "", "table", 0)
        samples = read_images(storage, shard, [Sample("", None, uri=uri, version=version)], options)
    else:
        info = storage.stat(uri) if version is None else ObjectInfo.of_version(uri, version)
        with storage.open_unbuffered(uri, info.version) as file:
            is_parquet = file.read(4) == b"PAR1"
        shard = Shard(uri, info.version, "parquet" if is_parquet else "webdataset", info.size)
        # A part of a large file is named after its first row or byte.
        index, start = row["index"], int(row["shard"].removeprefix(uri).rpartition("-")[2] or 0)
        if is_parquet:
            index += start
            groups = divide_files(storage, iter([shard]), 1)
            shard = next((x for x in groups if x.span and x.span[0] <= index < x.span[1]), shard)
            index -= shard.span[0] if shard.span else 0
        elif start:
            shard = replace(shard, span=(start, info.size))
        samples = read_samples(storage, shard, options)
    sample = next(islice(samples, index, None), None)
    if sample is None or sample.image is None:
        raise ValueError(f"row {row['index']} of {row['shard']} has no image: {sample and sample.error}")
    return sample.image
