"""Lists the shards of an input, and finds tables of Delta, Iceberg, Hudi and Lance by their metadata."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from os.path import commonprefix

from pipeline.config import ConfigError, InputConfig, InputFormat, InputUris, UriPattern
from pipeline.read.shards import Shard, ShardListing
from pipeline.read.snapshots import snapshot_files
from pipeline.read.tables import list_tables
from pipeline.storage import ObjectInfo, Storage, StorageError, is_under

#: The format of a table by its folder with metadata, and the names of these files.
_FORMATS = {"_delta_log": "Delta", "metadata": "Iceberg", ".hoodie": "Hudi", "_versions": "Lance"}
_METADATA = re.compile(
    r"/(?:(_delta_log|\.hoodie)/|(metadata)/[^/]*\.metadata\.json(?:\.gz)?$|(_versions)/[^/]*\.manifest$)"
)


def list_shards(storage: Storage, section: InputConfig) -> ShardListing:
    """Lists the shards of an input.

    The listing streams, and each step may raise `StorageError`, or `ConfigError` for a table that cannot be
    read. A pattern that is also the name of an existing object or folder is no pattern. Objects are ignored
    if a part of their name starts with `.` or `_` (`_SUCCESS`, `.DS_Store`, `__MACOSX/`), except in a URI of
    the input. The extension determines the format; another format than `auto` selects objects with its
    extensions, and objects that the input names exactly.
    """

    def as_literal(pattern: UriPattern) -> UriPattern:
        with suppress(StorageError):  # such as a path that is too long; listing the root raises the others
            if pattern.root != pattern.text and next(storage.list(pattern.text), None) is not None:
                return UriPattern.literal(pattern.text)
        return pattern

    inputs = replace(section.inputs, patterns=tuple(map(as_literal, section.inputs.patterns)))
    format, tables = section.format, set[str]()
    objects = _list_objects(storage, inputs, format, tables)
    listing = ShardListing(objects, inputs, None if format == "auto" else format, tables)
    if format == "table":
        listing.replace(lambda files: list_tables(storage, section, files, listing.ignore))
    return listing


def list_input_shards(storage: Storage, section: InputConfig, field: str) -> list[Shard]:
    """Returns all shards of an input. Raises the same errors as `ShardListing.require_shards`."""
    return list(list_shards(storage, section).require_shards(field))


def _list_objects(
    storage: Storage, inputs: InputUris, format: InputFormat, tables: set[str]
) -> Iterator[ObjectInfo]:
    """Lists the objects of an input, sorted in most stores, and some that its patterns do not select.

    The files of a table that were deleted from it remain in its folder. Therefore, a root that is a Delta or
    Iceberg table lists the files of its current snapshot, or for the format `table` the folder itself; the
    root is added to `tables`. Raises `StorageError`, or `ConfigError` if a selected Parquet or Lance file is
    in another table.
    """
    find = cache(partial(find_table, storage))  # many files of one folder may be roots
    for root, patterns in inputs.roots.items():
        prefix = commonprefix([pattern.prefix for pattern in patterns])[len(root) + 1 :]  # noqa: RUF071
        is_selected = bool(inputs.matches(root, root))
        table = kind = last_file = ""
        for info in storage.list(root, not is_selected, prefix):
            if format in ("webdataset", "images"):
                pass
            elif metadata := _METADATA.search(info.uri, len(root)):
                table, kind = info.uri[: metadata.start()], _FORMATS[metadata[metadata.lastindex or 0]]
            elif (
                info.uri.endswith((".parquet", ".lance"))
                and inputs.matches(root, info.uri)
                and not inputs.excludes(root, info.uri)
            ):
                # Metadata may be above the root, in the rest of the listing, or not start with the prefix.
                if not last_file:
                    start = root if info.uri == root else f"{root}/{prefix}"
                    table, kind = find(start.rpartition("/")[0]) or (table, kind)
                last_file = info.uri
            is_root = table == root and kind in ("Delta", "Iceberg") and is_selected
            # The files of a table are adjacent in a listing, or in another folder.
            if not table or not (is_under(last_file, table) or (is_root and format == "table")):
                yield info
            elif is_root:
                tables.add(root)
                yield from [ObjectInfo(root, 0, "")] if format == "table" else snapshot_files(storage, root)
                break
            else:
                remedy = "set input.uri to the table"
                if kind in ("Hudi", "Lance"):
                    remedy = "write its current rows as Parquet to another folder"
                raise ConfigError(
                    f"{table} is a table in {kind} format, whose folder also has files that are no longer "
                    f"part of it: {remedy}, or exclude it with input.exclude"
                )


def find_table(storage: Storage, folder: str) -> tuple[str, str] | None:
    """Finds the table of a file by its folder; returns folder and format of the table.

    Between a table and its files may be folders such as `data` and `column=value`.
    """
    name = "="
    while "=" in name or name == "data":
        for metadata, format in _FORMATS.items():
            if any(_METADATA.match(x.uri, len(folder)) for x in storage.list(f"{folder}/{metadata}")):
                return folder, format
        folder, _, name = folder.rpartition("/")
    return None
