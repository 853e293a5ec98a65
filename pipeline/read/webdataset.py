"""Reader of WebDataset tars, uncompressed or gzipped."""

import gzip
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import BinaryIO, cast

from pipeline.predictions import ErrorCategory, sample_error
from pipeline.read.limits import Deadline, TimedFile
from pipeline.read.samples import (
    ReadOptions,
    Sample,
    UnreadableShardError,
    describe_excess,
    parse_integer,
)
from pipeline.read.shards import IMAGE_EXTENSIONS, Shard
from pipeline.read.tar import read_members
from pipeline.storage import Storage

# Of a sample: all names like `frame.000001.jpg` have the key `frame`.
_MAX_MEMBERS, _MAX_EXTENSION = 1000, 255
_MAX_LABEL_BYTES = 4 * 1024**2  # per .cls or .json member; parsed JSON needs up to 25 times as much


def read_tar(storage: Storage, shard: Shard, options: ReadOptions, deadline: Deadline) -> Iterator[Sample]:
    """Yields the samples of a tar. Adjacent members with the same key form a sample."""
    info = shard.object
    with storage.open_sequential(info.uri, info.version, options.concurrent_fetches) as file:
        # The content determines the compression, because gzipped tars are often named .tar. GzipFile is used
        # instead of tarfile, which checks neither the end nor the checksum of gzip.
        is_gzip = file.peek(2)[:2] == b"\x1f\x8b"
        timed = cast(BinaryIO, TimedFile(file, deadline))
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=timed, mode="rb")) if is_gzip else timed
        current: _TarSample | None = None
        for member in read_members(stream, deadline):
            if member.isdir() or _is_hidden_member(member.name):
                continue
            key, extension = _split_name(member.name)
            if current is None or key != current.sample.key or current.is_full_for(extension):
                if current is not None:
                    yield current.finish()
                current = _TarSample(Sample(key, None))
            current.add(extension, member, stream, options)
            if not is_gzip and current.image_span:
                current.sample.offset, current.sample.size = current.image_span
        if current is not None:
            yield current.finish()


def _is_hidden_member(name: str) -> bool:
    parts = name.split("/")
    return "__MACOSX" in parts or any(part.startswith(".") and part not in {".", ".."} for part in parts)


def _split_name(name: str) -> tuple[str, str]:
    """Returns WebDataset's key and extension of a member: `a/b` and `c.jpg` for `a/b.c.JPG`."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension[:_MAX_EXTENSION].lower()


@dataclass(slots=True)
class _TarSample:
    """Collects the members of one sample; reads only the image and the label."""

    sample: Sample
    extensions: dict[str, None] = field(default_factory=dict)  # an ordered set
    image_span: tuple[int, int] | None = None  # offset and size of the image in the uncompressed tar

    @property
    def has_image(self) -> bool:
        return self.sample.image is not None or self.sample.error is not None

    def is_full_for(self, extension: str) -> bool:
        """Returns whether a member with the same key starts another sample."""
        return extension in self.extensions or len(self.extensions) == _MAX_MEMBERS

    def add(self, extension: str, info: tarfile.TarInfo, stream: BinaryIO, options: ReadOptions) -> None:
        self.extensions[extension] = None
        problem = None
        if not info.isreg() or info.type == tarfile.GNUTYPE_SPARSE:
            kind = f"a link to {info.linkname!r}" if info.linkname else "a special or sparse file"
            problem = f"{info.name!r} is {kind}, not a regular file"
        if extension in IMAGE_EXTENSIONS and not self.has_image:
            self.sample.error = options.size_error(info.size)
            if problem is not None:
                self.sample.error = sample_error(ErrorCategory.UNREADABLE_IMAGE, problem)
            if self.sample.error is None:
                self.sample.image = _content(info, stream)
                self.image_span = info.offset_data, info.size
        elif options.labels and extension == ("json" if options.label_field else "cls"):
            if problem is None and info.size > _MAX_LABEL_BYTES:
                problem = f"the label {describe_excess(info.size, _MAX_LABEL_BYTES)}"
            if problem is None:
                self.sample.label, problem = _label(_content(info, stream), options.label_field)
            self.sample.unmatched = problem

    def finish(self) -> Sample:
        """Returns the sample after its last member; a sample with an error has no target."""
        error = self.sample.error
        if not self.has_image:
            members = " ".join(f".{extension}" for extension in islice(self.extensions, 8))
            error = sample_error(
                ErrorCategory.NO_IMAGE,
                f"no member has a supported image extension (members: {members}); the members of a sample "
                "must be adjacent in the tar, and the extension starts at the first dot",
            )
        return self.sample if error is None else self.sample.fail(error)


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
            text = content.decode("utf-8-sig").strip()
            integer = parse_integer(text)
            return (text if integer is None else integer), None
        value: object = json.loads(content)
    except (ValueError, RecursionError) as error:
        problem = ".cls member is not UTF-8 text" if label_field is None else ".json member is not valid JSON"
        return None, f"the {problem} ({error})"
    for name in label_field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, list | dict):  # may be large, or nested too deeply for a message
        return None, f"a {type(value).__name__} is not a class of the model"
    return value, None
