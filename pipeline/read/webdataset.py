"""Reader of WebDataset tars, uncompressed or gzipped."""

import gzip
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import BinaryIO, Self, cast

from pipeline.predictions import ErrorCategory, SampleError, sample_error
from pipeline.read.samples import (
    ReadOptions,
    Sample,
    UnreadableShardError,
    describe_excess,
    parse_integer,
)
from pipeline.read.shards import IMAGE_EXTENSIONS, Shard
from pipeline.storage import Storage

_MAX_MEMBERS = 1000  # per sample; all names like `frame.000001.jpg` have the key `frame`
_MAX_LABEL_BYTES = 16 * 1024**2  # per .cls or .json member


class _StrictTarInfo(tarfile.TarInfo):
    """Reads headers, and raises an error where `tarfile` silently ends the archive.

    After the first member, tarfile ends its iteration without an error at a corrupt header, at a truncated
    header, and at the end of the file. This class accepts only the zero block that ends every tar.
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
                raise UnreadableShardError("not a tar or gzipped tar: the first header is invalid") from error
            raise UnreadableShardError(f"the tar is damaged or truncated at byte {start}: {error}") from error
        if info.size < 0 or tarfile.offset <= start:  # would cause an endless loop
            raise UnreadableShardError(f"the tar is damaged: the member at byte {start} has a negative size")
        return info


_HEADER_ERRORS: type[Exception] = tarfile.HeaderError
_END_OF_ARCHIVE: type[Exception] = tarfile.EOFHeaderError  # type: ignore[attr-defined]


def read_tar(storage: Storage, shard: Shard, options: ReadOptions) -> Iterator[Sample]:
    """Yields the samples of a tar. Adjacent members with the same key form a sample."""
    with storage.open_sequential(shard.uri, shard.version, options.concurrent_fetches) as file:
        # The content determines the compression, because gzipped tars are often named .tar. GzipFile is used
        # instead of tarfile, which checks neither the end nor the checksum of gzip.
        is_gzip = file.peek(2)[:2] == b"\x1f\x8b"
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb") if is_gzip else file)
        current: _TarSample | None = None
        for info in _members(stream):
            key, extension = _split_name(info.name)
            if current is None or key != current.key or current.is_full_for(extension):
                if current is not None:
                    yield current.to_sample(options)
                current = _TarSample(key)
            current.add(extension, info, stream, options)
        if current is not None:
            yield current.to_sample(options)


def _members(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yields the members that may belong to a sample; raises an error if data follows the end of the tar."""
    with tarfile.open(
        fileobj=stream,
        mode="r:",
        tarinfo=_StrictTarInfo,
        encoding="utf-8",
        errors="backslashreplace",  # keys stay distinct and can be encoded as UTF-8
    ) as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined] # tarfile would keep all members
            if not info.isdir() and not _is_hidden_member(info.name):
                yield info
        while block := stream.read(1024**2):
            if block.count(b"\0") != len(block):
                cause = "a block was overwritten with zeros, or several tars were concatenated"
                raise UnreadableShardError(f"the tar is damaged: data follows the end of the tar ({cause})")


def _is_hidden_member(name: str) -> bool:
    parts = name.split("/")
    return "__MACOSX" in parts or any(part.startswith(".") and part not in {".", ".."} for part in parts)


def _split_name(name: str) -> tuple[str, str]:
    """Returns WebDataset's key and extension of a member: `a/b` and `c.jpg` for `a/b.c.JPG`."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


@dataclass(slots=True)
class _TarSample:
    """Collects the members of one sample; reads only the image and the label."""

    key: str
    extensions: dict[str, None] = field(default_factory=dict)  # an ordered set
    image: bytes | None = None
    error: SampleError | None = None
    label: object = None
    label_problem: str | None = None
    has_image: bool = False

    def is_full_for(self, extension: str) -> bool:
        """Returns whether a member with the same key starts another sample."""
        return extension in self.extensions or len(self.extensions) == _MAX_MEMBERS

    def add(self, extension: str, info: tarfile.TarInfo, stream: BinaryIO, options: ReadOptions) -> None:
        self.extensions[extension] = None
        problem = None
        if not info.isreg() or info.issparse():
            kind = f"a link to {info.linkname!r}" if info.linkname else "a special or sparse file"
            problem = f"{info.name!r} is {kind}, not a regular file"
        if extension in IMAGE_EXTENSIONS and not self.has_image:
            self.has_image = True
            if problem is not None:
                self.error = sample_error(ErrorCategory.UNREADABLE_IMAGE, problem)
            else:
                self.error = options.size_error(info.size)
            if self.error is None:
                self.image = _content(info, stream)
        elif options.labels and extension == ("json" if options.label_field else "cls"):
            if problem is None and info.size > _MAX_LABEL_BYTES:
                problem = f"the label {describe_excess(info.size, _MAX_LABEL_BYTES)}"
            if problem is None:
                self.label, problem = _label(_content(info, stream), options.label_field)
            self.label_problem = problem

    def to_sample(self, options: ReadOptions) -> Sample:
        if not self.has_image:
            members = " ".join(f".{extension}" for extension in islice(self.extensions, 8))
            self.error = sample_error(
                ErrorCategory.NO_IMAGE,
                f"no member has a supported image extension (members: {members}); the members of a sample "
                "must be adjacent in the tar, and the extension starts at the first dot",
            )
        if self.error is not None:
            return Sample(self.key, None, error=self.error)
        target, unmatched = options.parse_target(self.label)
        return Sample(self.key, self.image, target, unmatched=self.label_problem or unmatched)


def _content(info: tarfile.TarInfo, stream: BinaryIO) -> bytes:
    """Reads the bytes of a regular member."""
    stream.seek(info.offset_data)
    content = stream.read(info.size)
    if len(content) < info.size:
        raise UnreadableShardError(f"the tar is damaged or truncated: the file ends within {info.name!r}")
    return content


def _label(content: bytes, label_field: str | None) -> tuple[object, str | None]:
    """Returns the integer or text of a .cls member, or a field of a .json member; None if missing.

    `label_field` is the path of the field, such as `meta.label`. The second result is why the member cannot
    be read.
    """
    try:
        if label_field is None:
            text = content.decode().strip()
            integer = parse_integer(text)
            return (text if integer is None else integer), None
        value: object = json.loads(content)
    except (ValueError, RecursionError) as error:
        problem = ".cls member is not UTF-8 text" if label_field is None else ".json member is not valid JSON"
        return None, f"the {problem} ({error})"
    for name in label_field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value, None
