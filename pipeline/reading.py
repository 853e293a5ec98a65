"""Readers: a shard in, its samples out, one at a time, in the same order every time.

WebDataset tars, Parquet files with image bytes, and groups of loose images. Nothing is decoded here,
and pickles are never loaded. A bad sample is a sample with an error; a bad shard is a `ShardError`.
"""

from __future__ import annotations

import gzip
import json
import math
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.shards import IMAGE_EXTENSIONS, Shard, name_below
from pipeline.storage import ObjectChanged, ObjectInfo, ObjectNotFound, Storage, StorageError

_MAX_MEMBERS = 1000  # of one sample: names like `frame.000001.jpg` all have the key `frame`
_MAX_LABEL_BYTES = 16 * 1024**2  # of one .cls or .json
_PARQUET_BATCH_ROWS = 16
_PARQUET_BUFFER_BYTES = 8 * 1024**2  # read at once from each column
_FETCHES = 8  # loose images fetched at once
_MAX_LABEL_ID = 2**31  # of the predictions' int32 column
_IGNORE_HINT = "labels can be ignored by `input.labels: false`"


class ShardError(Exception):
    """The shard can't be read; the message names its URI, the place in it and the cause.

    Attributes:
        uri: The shard's URI.
        cause: The message without the URI.
        may_pass: Whether it is the storage's fault, not the shard's: another day it may be readable.
    """

    def __init__(self, uri: str, cause: str, may_pass: bool = False) -> None:
        super().__init__(uri, cause, may_pass)
        self.uri = uri
        self.cause = cause
        self.may_pass = may_pass

    def __str__(self) -> str:
        return f"{self.uri}: {self.cause}"


@dataclass(slots=True)
class Sample:
    """One image, or what stands in its place.

    Attributes:
        key: Its name in the shard. Not always unique: shard and position identify a sample.
        image: The encoded image, null where `error` is set.
        target: The shard's own label, as a class index; null where there is none.
        error: Why there is no image to classify, null where there is one.
    """

    key: str
    image: bytes | None
    target: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class ReadOptions:
    """What readers must know; hashable and picklable.

    Attributes:
        labels: Read the samples' own labels. Without, every target is null.
        label_field: WebDataset: the (dotted) field of `.json` that holds the label, not `.cls`.
        image_column: Parquet: the image's column; found by name and type if null.
        label_column: Parquet: the label's column; no labels if null.
        key_column: Parquet: the key's column; if null, the image's path, else the row's number.
        class_ids: Pairs of class name and class index, for labels that are names.
        num_labels: Class indices go from 0 to below this; null: any that fits an int32.
        max_image_bytes: Larger images become error rows (unread, in tars and loose images).
        fetches: Ranges of a tar, of 8 MiB, that are fetched at once.
    """

    labels: bool = True
    label_field: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    key_column: str | None = None
    class_ids: tuple[tuple[str, int], ...] = ()
    num_labels: int | None = None
    max_image_bytes: int = 256 * 1024**2
    fetches: int = 4


def read_samples(storage: Storage, shard: Shard, options: ReadOptions) -> Iterator[Sample]:
    """Yields the shard's samples in shard order; a second reading yields the same.

    Streams: it holds one sample of a tar, 16 rows of a Parquet file and the pages that they lie in (by
    default pyarrow writes 1024 rows a page), or 16 loose images, and read buffers of 8 MiB: one, or of a
    tar in object storage one more than `fetches`. The object is pinned to the shard's version.

    **WebDataset.** Adjacent members whose names are equal up to the first dot of the last part form a
    sample, with that as its key; the image is the first whose remaining extension is an image's. A
    member whose extension the sample has already starts another sample of the same key. Members that
    are not adjacent to their image become a sample of their own: an error that names them. The label
    is `.cls` (a class index or name), or a field of `.json`. Folders and hidden members (`._x.jpg`,
    `__MACOSX/`) are skipped.

    **Parquet.** The image column holds binary values, or `struct<bytes, path>` as Hugging Face writes
    them: the column named `image`, else the only one of such a type.

    **Loose images.** Keys are the names below the listed folder. There are no labels.

    A label that is null or -1 is none; one that is no class makes the sample an error.

    Raises:
        ShardError: the object is missing, changed, truncated, corrupt, of another format, or lacks a
            named column. What was yielded before stands for nothing: the shard is not labelled.
    """
    key = None
    count = 0
    try:
        for sample in _READERS[shard.format](storage, shard, options):
            key, count = sample.key, count + 1
            yield sample
    except ShardError:
        raise
    except Exception as error:
        # Whatever the bytes of one shard do to a parser must not end the job for all others.
        place = f"after {count} samples (the last was {key!r}): " if count else ""
        is_storage = isinstance(error, StorageError) and not isinstance(error, ObjectNotFound | ObjectChanged)
        raise ShardError(shard.uri, place + _cause(shard, error), may_pass=is_storage) from error


def _cause(shard: Shard, error: Exception) -> str:
    if isinstance(error, StorageError):
        return error.cause if error.uri == shard.uri else str(error)
    if isinstance(error, _DamagedTarError):
        return str(error)
    what = {"webdataset": "the tar is damaged, or no tar at all"}
    what |= {"parquet": "the Parquet file is damaged, or none at all"}
    return f"{what.get(shard.format, 'unreadable')} ({type(error).__name__}: {error})"


# Labels ------------------------------------------------------------------------------------------


class _LabelError(ValueError):
    """A label that names no class; the message is the sample's error."""


def _target(value: object, options: ReadOptions, names: dict[str, int]) -> int | None:
    """A label as a class index, null for none; text is a class name, or else an index."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    found: object = value
    if isinstance(value, str):
        text = value.strip()
        found = names.get(text, _whole_number(text))
    elif isinstance(value, float) and value.is_integer():  # pandas' integers beside nulls
        found = int(value)
    if not isinstance(found, int) or isinstance(found, bool):
        raise _LabelError(f"label {_shortened(value)} is no class of the model; {_IGNORE_HINT}")
    if found == -1:
        return None
    limit = options.num_labels if options.num_labels is not None else _MAX_LABEL_ID
    if not 0 <= found < limit:
        raise _LabelError(f"label {_shortened(value)} is not in 0..{limit - 1}; {_IGNORE_HINT}")
    return found


def _whole_number(text: str) -> int | None:
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# WebDataset --------------------------------------------------------------------------------------


class _DamagedTarError(Exception):
    """The tar is cut or corrupt."""


class _StrictTarInfo(tarfile.TarInfo):
    """Reads headers and refuses what `tarfile` takes for the end of the archive.

    After the first member, tarfile ends its iteration without a word at a corrupt header, at half a
    header and at the end of the file. Only the zero block that closes every tar is an end here.
    """

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _StrictTarInfo:
        start = tarfile.fileobj.tell() if tarfile.fileobj else 0
        try:
            info = super().fromtarfile(tarfile)
        except _HEADER_ERRORS as error:
            if type(error) is _END_OF_ARCHIVE:
                raise
            if start == 0:
                raise _DamagedTarError("no tar or gzipped tar: its first header is none") from error
            cause = _HEADER_FAULTS.get(type(error).__name__, "a header is corrupt")
            raise _DamagedTarError(f"the tar is damaged: {cause} (at byte {start})") from error
        if info.size < 0 or tarfile.offset <= start:  # would be read for ever
            raise _DamagedTarError(f"the tar is damaged: a member of negative size at byte {start}")
        return info


_HEADER_ERRORS: type[Exception] = tarfile.HeaderError
_END_OF_ARCHIVE: type[Exception] = tarfile.EOFHeaderError  # type: ignore[attr-defined]
_HEADER_FAULTS = {
    "EmptyHeaderError": "it ends without the closing zero block, so it is cut off",
    "TruncatedHeaderError": "it ends within a header, so it is cut off",
}


def _read_tar(storage: Storage, shard: Shard, options: ReadOptions) -> Iterator[Sample]:
    names = dict(options.class_ids)
    with storage.open_ahead(shard.uri, shard.version, options.fetches) as file:
        # By content: gzip is often called .tar. Not by tarfile, which checks neither gzip's end nor
        # its checksum.
        zipped = file.peek(2)[:2] == b"\x1f\x8b"
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb") if zipped else file)
        gathered: _TarSample | None = None
        for info in _members(stream):
            key, kind = _split_name(info.name)
            if gathered is None or key != gathered.key or gathered.is_full_for(kind):
                if gathered is not None:
                    yield gathered.finished(options, names)
                gathered = _TarSample(key)
            gathered.add(kind, info, stream, options)
        if gathered is not None:
            yield gathered.finished(options, names)


def _members(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The tar's members that may belong to a sample; at the end, checks that it is the end."""
    with tarfile.open(
        fileobj=stream,
        mode="r:",
        tarinfo=_StrictTarInfo,
        encoding="utf-8",
        errors="backslashreplace",  # keys are written as UTF-8, and stay distinct
    ) as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined] # else it would keep all of them
            if not info.isdir() and not _is_hidden(info.name):
                yield info
        while block := stream.read(1024**2):
            if block.count(b"\0") != len(block):
                raise _DamagedTarError(
                    "the tar is damaged: there is data after its end (a block in its midst is zeroed, "
                    "or several tars were put together)"
                )


def _is_hidden(name: str) -> bool:
    parts = name.split("/")
    return "__MACOSX" in parts or any(part.startswith(".") and part not in {".", ".."} for part in parts)


def _split_name(name: str) -> tuple[str, str]:
    """`a/b.c.JPG` -> (`a/b`, `c.jpg`): what WebDataset takes for key and extension."""
    folder, slash, last = name.rpartition("/")
    stem, _, kind = last.partition(".")
    return folder + slash + stem, kind.lower()


@dataclass(slots=True)
class _TarSample:
    """The members of one sample, gathered as they come; only what is needed is read."""

    key: str
    kinds: dict[str, None] = field(default_factory=dict)  # in their order
    image: bytes | None = None
    error: str | None = None
    label: object = None
    has_image: bool = False

    def is_full_for(self, kind: str) -> bool:
        """Whether a member with the same key must belong to another sample."""
        return kind in self.kinds or len(self.kinds) == _MAX_MEMBERS

    def add(self, kind: str, info: tarfile.TarInfo, stream: BinaryIO, options: ReadOptions) -> None:
        self.kinds[kind] = None
        if kind in IMAGE_EXTENSIONS and not self.has_image:
            self.has_image = True
            self.image = self._content(info, stream, "image", options.max_image_bytes)
        elif options.labels and kind == ("json" if options.label_field else "cls"):
            content = self._content(info, stream, "label", _MAX_LABEL_BYTES)
            if content is not None:
                self._read_label(content, options.label_field)

    def finished(self, options: ReadOptions, names: dict[str, int]) -> Sample:
        if not self.has_image:
            members = " ".join(f".{kind}" for kind in islice(self.kinds, 8))
            self.error = (
                f"no image in a supported format (members: {members}); the members of a sample must "
                "be adjacent in the tar, and extensions start at the first dot"
            )
        target = None
        if self.error is None:
            try:
                target = _target(self.label, options, names)
            except _LabelError as error:
                self.error = str(error)
        return Sample(self.key, self.image if self.error is None else None, target, self.error)

    def _content(self, info: tarfile.TarInfo, stream: BinaryIO, what: str, limit: int) -> bytes | None:
        """The member's bytes; null, and the sample has its error, if they can't be had."""
        if not info.isreg() or info.issparse():
            kind = f"a link to {info.linkname!r}" if info.linkname else "not a regular file"
            self._fail(f"the {what} {info.name!r} is {kind}, not a file with bytes")
        elif info.size > limit:
            self._fail(_too_large(what, info.size, limit))
        else:
            stream.seek(info.offset_data)
            content = stream.read(info.size)
            if len(content) < info.size:
                raise _DamagedTarError(f"the tar is damaged: it ends within {info.name!r}, so it is cut off")
            return content
        return None

    def _read_label(self, content: bytes, label_field: str | None) -> None:
        try:
            if label_field is None:
                text = content.decode().strip()
                number = _whole_number(text)
                self.label = text if number is None else number
            else:
                self.label = _field(json.loads(content), label_field)
        except (ValueError, RecursionError) as error:
            what = ".cls is not text" if label_field is None else ".json is not valid JSON"
            self._fail(f"the sample's {what} ({error}); {_IGNORE_HINT}")

    def _fail(self, error: str) -> None:
        self.error = self.error or error


def _field(value: Any, dotted: str) -> object:
    """`_field({"a": {"b": 1}}, "a.b")` -> 1; null where there is no such field."""
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return cast(object, value)


def _too_large(what: str, size: int, limit: int) -> str:
    setting = " (input.max_image_bytes)" if what == "image" else ""
    return f"the {what} has {size} bytes, more than the limit of {limit}{setting}"


# Parquet -----------------------------------------------------------------------------------------


def _read_parquet(storage: Storage, shard: Shard, options: ReadOptions) -> Iterator[Sample]:
    names = dict(options.class_ids)
    # Column chunks are read through a buffer each, straight from the object: one more buffer in
    # front would be emptied by each change of column. `pre_buffer` would hold whole row groups.
    with (
        storage.open_raw(shard.uri, shard.version) as stream,
        pq.ParquetFile(
            stream, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        ) as file,
    ):
        schema = file.schema_arrow
        image_column = _image_column(schema, shard, options)
        label_column = options.label_column if options.labels else None
        wanted = [image_column]
        for name in (label_column, options.key_column):
            if name is not None:
                _require_column(schema, name, shard)
                wanted.append(name)
        row = 0
        for batch in file.iter_batches(_PARQUET_BATCH_ROWS, columns=wanted, use_threads=False):
            images, paths = _image_values(batch.column(image_column))
            labels = batch.column(label_column) if label_column is not None else None
            keys = batch.column(options.key_column) if options.key_column is not None else paths
            sizes = pc.binary_length(images)
            for i in range(batch.num_rows):
                sample = Sample(_key(keys, i, row), None)
                label = labels[i].as_py() if labels is not None else None
                sample.target, sample.error = _checked_row(sizes[i].as_py(), label, options, names)
                if sample.error is None:
                    sample.image = images[i].as_py()
                yield sample
                row += 1


def _image_column(schema: pa.Schema, shard: Shard, options: ReadOptions) -> str:
    """The column that holds the images: as configured, or found."""
    found = [column.name for column in schema if _is_image_type(column.type)]
    name = options.image_column
    if name is not None:
        _require_column(schema, name, shard)
        if name not in found:
            raise ShardError(
                shard.uri,
                f"column {name!r} is {schema.field(name).type}, neither binary nor a struct with "
                f"binary `bytes`; {_columns(schema)}",
            )
        return name
    if "image" in found:
        return "image"
    if len(found) != 1:
        count = "no column" if not found else "more than one column"
        raise ShardError(
            shard.uri,
            f"{count} could be the image; name it by `input.image_column`; {_columns(schema)}",
        )
    return cast(str, found[0])


def _require_column(schema: pa.Schema, name: str, shard: Shard) -> None:
    if schema.names.count(name) != 1:
        raise ShardError(shard.uri, f"there is no single column {name!r}; {_columns(schema)}")


def _columns(schema: pa.Schema) -> str:
    shown = [f"{column.name} ({column.type})" for column in islice(schema, 20)]
    return "its columns: " + ", ".join(shown) + (", ..." if len(schema) > 20 else "")


def _is_image_type(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image_values(column: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """The images' bytes, and their paths where the column holds them."""
    if not pa.types.is_struct(column.type):
        return column, None
    has_path = column.type.get_field_index("path") >= 0
    return pc.struct_field(column, "bytes"), pc.struct_field(column, "path") if has_path else None


def _key(keys: pa.Array | None, i: int, row: int) -> str:
    value = keys[i].as_py() if keys is not None else None
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return f"{row:09d}" if value is None else str(value)


def _checked_row(
    size: int | None, label: object, options: ReadOptions, names: dict[str, int]
) -> tuple[int | None, str | None]:
    """A row's target and error."""
    if size is None:
        return None, "the row has no image bytes"
    if size > options.max_image_bytes:
        return None, _too_large("image", size, options.max_image_bytes)
    try:
        return _target(label, options, names), None
    except _LabelError as error:
        return None, str(error)


# Loose images ------------------------------------------------------------------------------------


def _read_images(storage: Storage, shard: Shard, options: ReadOptions) -> Iterator[Sample]:
    folder = shard.uri.rpartition("/")[0]

    def fetch(info: ObjectInfo) -> Sample:
        key = name_below(folder, info.uri)
        if info.size > options.max_image_bytes:
            error = _too_large("image", info.size, options.max_image_bytes)
            return Sample(key, None, error=error)
        try:
            return Sample(key, storage.read(info.uri, info.version))
        except (ObjectNotFound, ObjectChanged) as failure:
            return Sample(key, None, error=str(failure))

    pending: deque[Future[Sample]] = deque()
    with ThreadPoolExecutor(_FETCHES) as pool:
        try:
            for info in shard.members:
                pending.append(pool.submit(fetch, info))
                if len(pending) == 2 * _FETCHES:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


_READERS = {"webdataset": _read_tar, "parquet": _read_parquet, "images": _read_images}
