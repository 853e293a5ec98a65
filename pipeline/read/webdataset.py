"""Reading WebDataset tars, gzipped ones too."""

import gzip
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import BinaryIO, Self, cast

from pipeline.predictions import ErrorCategory, SampleError, sample_error
from pipeline.read.samples import (
    IGNORE_HINT,
    ReadOptions,
    Sample,
    UnreadableShardError,
    too_large,
    whole_number,
)
from pipeline.read.shards import IMAGE_EXTENSIONS, Shard
from pipeline.storage import Storage

_MAX_MEMBERS = 1000  # of one sample: names like `frame.000001.jpg` all have the key `frame`
_MAX_LABEL_BYTES = 16 * 1024**2  # of one .cls or .json


class _DamagedSampleError(Exception):
    """The image or the label of a sample can't be read."""

    def __init__(self, error: SampleError) -> None:
        super().__init__(error)
        self.error = error


class _StrictTarInfo(tarfile.TarInfo):
    """Reads headers and refuses what `tarfile` takes for the end of the archive.

    After the first member, tarfile ends its iteration without a word at a corrupt header, at half a
    header and at the end of the file. Only the zero block that closes every tar is an end here.
    """

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        start = tarfile.fileobj.tell() if tarfile.fileobj else 0
        try:
            info = super().fromtarfile(tarfile)
        except _HEADER_ERRORS as error:
            if type(error) is _END_OF_ARCHIVE:
                raise
            if start == 0:
                raise UnreadableShardError("no tar or gzipped tar: its first header is none") from error
            raise UnreadableShardError(f"the tar is damaged or cut off at byte {start}: {error}") from error
        if info.size < 0 or tarfile.offset <= start:  # would be read for ever
            raise UnreadableShardError(f"the tar is damaged: a member of negative size at byte {start}")
        return info


_HEADER_ERRORS: type[Exception] = tarfile.HeaderError
_END_OF_ARCHIVE: type[Exception] = tarfile.EOFHeaderError  # type: ignore[attr-defined]


def read_tar(storage: Storage, shard: Shard, options: ReadOptions) -> Iterator[Sample]:
    """Yields the samples of a tar: adjacent members with the same key."""
    with storage.open_sequential(shard.uri, shard.version, options.fetches) as file:
        # By content: gzip is often called .tar. Not by tarfile, which checks neither gzip's end nor
        # its checksum.
        zipped = file.peek(2)[:2] == b"\x1f\x8b"
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb") if zipped else file)
        gathered: _TarSample | None = None
        for info in _members(stream):
            key, kind = _split_name(info.name)
            if gathered is None or key != gathered.key or gathered.is_full_for(kind):
                if gathered is not None:
                    yield gathered.finished(options)
                gathered = _TarSample(key)
            gathered.add(kind, info, stream, options)
        if gathered is not None:
            yield gathered.finished(options)


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
                cause = "a block in its midst is zeroed, or several tars were put together"
                raise UnreadableShardError(f"the tar is damaged: there is data after its end ({cause})")


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
    error: SampleError | None = None
    label: object = None
    has_image: bool = False

    def is_full_for(self, kind: str) -> bool:
        """Whether a member with the same key must belong to another sample."""
        return kind in self.kinds or len(self.kinds) == _MAX_MEMBERS

    def add(self, kind: str, info: tarfile.TarInfo, stream: BinaryIO, options: ReadOptions) -> None:
        self.kinds[kind] = None
        try:
            if kind in IMAGE_EXTENSIONS and not self.has_image:
                self.has_image = True
                size_error = options.size_error(info.size)
                self.image = _content(info, stream, ErrorCategory.UNREADABLE_IMAGE, size_error)
            elif options.labels and kind == ("json" if options.label_field else "cls"):
                content = _content(info, stream, ErrorCategory.UNREADABLE_LABEL, _label_size_error(info.size))
                self.label = _label(content, options.label_field)
        except _DamagedSampleError as error:
            self.error = self.error or error.error

    def finished(self, options: ReadOptions) -> Sample:
        if not self.has_image:
            members = " ".join(f".{kind}" for kind in islice(self.kinds, 8))
            self.error = sample_error(
                ErrorCategory.NO_IMAGE,
                f"no member has a supported image extension (members: {members}); the members of a sample "
                "must be adjacent in the tar, and the extension starts at the first dot",
            )
        target = None
        if self.error is None:
            target, self.error = options.parse_target(self.label)
        return Sample(self.key, self.image if self.error is None else None, target, self.error)


def _label_size_error(size: int) -> SampleError | None:
    if size <= _MAX_LABEL_BYTES:
        return None
    return sample_error(ErrorCategory.UNREADABLE_LABEL, f"the label {too_large(size, _MAX_LABEL_BYTES)}")


def _content(
    info: tarfile.TarInfo, stream: BinaryIO, category: ErrorCategory, size_error: SampleError | None
) -> bytes:
    """Reads a member's bytes; raises `_DamagedSampleError` of the category if it isn't a regular file."""
    if not info.isreg() or info.issparse():
        kind = f"a link to {info.linkname!r}" if info.linkname else "a special or sparse file"
        raise _DamagedSampleError(sample_error(category, f"{info.name!r} is {kind}, not a regular file"))
    if size_error is not None:
        raise _DamagedSampleError(size_error)
    stream.seek(info.offset_data)
    content = stream.read(info.size)
    if len(content) < info.size:
        raise UnreadableShardError(f"the tar is damaged: it ends within {info.name!r}, so it is cut off")
    return content


def _label(content: bytes, label_field: str | None) -> object:
    """Returns the number or text of a .cls file, or the dotted field of a .json file; None if missing."""
    try:
        if label_field is None:
            text = content.decode().strip()
            number = whole_number(text)
            return text if number is None else number
        value: object = json.loads(content)
    except (ValueError, RecursionError) as error:
        what = ".cls is not text" if label_field is None else ".json is not valid JSON"
        detail = f"the sample's {what} ({error}); {IGNORE_HINT}"
        raise _DamagedSampleError(sample_error(ErrorCategory.UNREADABLE_LABEL, detail)) from None
    for name in label_field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
