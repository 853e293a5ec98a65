"""Reader of WebDataset tars, uncompressed or compressed."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline.predictions import ErrorCategory, sample_error
from pipeline.read.compression import DecompressedFile, find_compression
from pipeline.read.limits import Deadline, TimedFile
from pipeline.read.samples import ReadOptions, Sample, UnreadableShardError, describe_excess
from pipeline.read.shards import IMAGE_EXTENSIONS, Shard
from pipeline.read.tar import PLAIN_TYPES, TarEndError, read_members
from pipeline.storage import Storage

# Of a sample: all names like `frame.000001.jpg` have the key `frame`.
_MAX_MEMBERS, _MAX_EXTENSION = 1000, 255
_MAX_LABEL_BYTES = 4 * 1024**2  # per .cls or .json member; parsed JSON needs up to 25 times as much


def read_tar(storage: Storage, shard: Shard, options: ReadOptions, deadline: Deadline) -> Iterator[Sample]:
    """Yields the samples of a tar. Adjacent members with the same key form a sample."""
    info = shard.object
    with (
        storage.open(info.uri, info.version, options.read.concurrent_fetches) as file,
        storage.open_unbuffered(info.uri, info.version) as links,  # a link does not interrupt the read-ahead
    ):
        # The content determines the compression, because compressed tars are often named .tar.
        start, stop = shard.span or (0, info.size)
        compression = find_compression(file.peek(16)) if shard.span is None else None
        stream: Any = TimedFile(file, deadline)
        if compression is not None:
            stream = DecompressedFile(stream, compression)
        current: _TarSample | None = None
        try:
            last = None if stop == info.size else stop
            for member in read_members(stream, start, last, links=compression is None):
                if is_ignored(member):
                    continue
                key, extension = split_name(member.name, options.input.key)
                if current is not None and (key != current.sample.key or current.is_full_for(extension)):
                    yield current.finish()
                    current = None
                current = current or _TarSample(Sample(key, None), options, compression)
                is_link = member.offset_data < member.offset
                current.add(extension, member, links if is_link else stream)
        except TarEndError:
            if current is not None:
                yield current.finish()
            raise
        if current is not None:
            yield current.finish()


def is_ignored(member: tarfile.TarInfo) -> bool:
    """Returns whether a member belongs to no sample: a folder, or a hidden file."""
    parts = member.name.split("/")
    is_hidden = any(part.startswith(".") and part not in {".", ".."} for part in parts)
    return member.isdir() or is_hidden or "__MACOSX" in parts


def split_name(name: str, rule: str) -> tuple[str, str]:
    """Returns key and extension of a member: `a/b` and `c.jpg` for `a/b.c.JPG`, or `a/b.c` and `jpg`."""
    folder, slash, last = name.rpartition("/")
    first, _, extension = last.partition(".")
    if rule == "last-dot" and extension:
        first, _, extension = last.rpartition(".")
    return folder + slash + first, extension[:_MAX_EXTENSION].lower()


@dataclass(slots=True)
class _TarSample:
    """Collects the members of one sample; reads only the image and the label."""

    sample: Sample
    options: ReadOptions
    compression: str | None
    extensions: dict[str, None] = field(default_factory=dict)  # an ordered set
    image_rank: int = 0  # of the image so far, see `_image_rank`
    carried_problem: str | None = None

    def is_full_for(self, extension: str) -> bool:
        """Returns whether a member with the same key starts another sample."""
        return extension in self.extensions or len(self.extensions) == _MAX_MEMBERS

    def add(self, extension: str, info: tarfile.TarInfo, file: Any) -> None:
        """Adds a member, whose content is in the file."""
        self.extensions[extension] = None
        section, rank = self.options.input, self._image_rank(extension)
        carry = section.carry if extension == "json" else {}
        has_label = section.labels and extension == ("json" if section.label_field else "cls")
        if rank:
            if self.image_rank:
                self.sample.merged += 1
            if rank > self.image_rank:
                self.image_rank = rank
                self._set_image(info, file)
        elif has_label or carry:
            document: Any = None
            carried = tuple[pa.Scalar, ...]()
            problem = None
            try:
                if info.size > _MAX_LABEL_BYTES:
                    raise ValueError(f"it {describe_excess(info.size, _MAX_LABEL_BYTES)}")
                content = _content(info, file)
                document = content.decode() if extension == "cls" else json.loads(content)
                carried = tuple(_scalar(_field(document, name), kind) for name, kind in carry.items())
            except (ValueError, RecursionError) as error:
                problem = f"the .{extension} member cannot be read: {error}"
            if carry:
                self.sample.carried, self.carried_problem = carried, problem
            if has_label:
                label = _field(document, section.label_field) if section.label_field else document
                if isinstance(label, list | dict):  # may be large, or nested too deeply for a message
                    label, problem = None, f"a {type(label).__name__} is not a class of the model"
                self.sample.label, self.sample.unmatched = label, problem

    def _set_image(self, info: tarfile.TarInfo, file: Any) -> None:
        sample = self.sample
        sample.image = sample.offset = sample.size = None
        sample.error = self.options.size_error(info.size)
        if sample.error is not None:
            return
        try:
            sample.image = _content(info, file)
        except ValueError as error:
            sample.error = sample_error(ErrorCategory.UNREADABLE_IMAGE, str(error))
        else:
            if self.compression is None:
                sample.offset, sample.size = info.offset_data, info.size

    def _image_rank(self, extension: str) -> int:
        """Returns 0 for a member that is no image. The first member of the highest rank is the image.

        `jpg` precedes `left.jpg`, so that a mask before its image is not labeled.
        """
        if self.options.input.image_member is not None:
            return int(extension == self.options.input.image_member)
        if extension in IMAGE_EXTENSIONS:
            return 2
        return int(extension.rpartition(".")[2] in IMAGE_EXTENSIONS)

    def finish(self) -> Sample:
        """Returns the sample after its last member; a sample with an error has no target."""
        sample, wanted = self.sample, self.options.input.image_member
        if not self.image_rank:
            wanted = f"the extension .{wanted} (input.image_member)" if wanted else "an image extension"
            members = " ".join(f".{extension}" for extension in islice(self.extensions, 8))
            dot = self.options.input.key.replace("-", " ")
            sample.error = sample_error(
                ErrorCategory.NO_IMAGE,
                f"no member has {wanted} (members: {members}); the members of a sample must be adjacent in "
                f"the tar, and the extension starts at the {dot} (input.key)",
            )
        elif sample.error is None and self.carried_problem is not None:
            sample.error = sample_error(ErrorCategory.INVALID_CARRIED_VALUE, self.carried_problem)
        return sample if sample.error is None else sample.fail(sample.error)


def _content(info: tarfile.TarInfo, file: Any) -> bytes:
    """Reads the bytes of a member; raises `ValueError` if it is no regular file."""
    if info.type not in PLAIN_TYPES:
        kind = f"a link to {info.linkname!r}" if info.linkname else "a special or sparse file"
        problem = f"{info.name!r} is {kind}, not a regular file"
        if info.islnk():
            problem += "; hard links are read only to earlier files of a tar that is not compressed, and of "
            problem += "the same part (read.split_bytes: null makes one part); create the tar with "
            problem += "`tar --hard-dereference`"
        raise ValueError(problem)
    file.seek(info.offset_data)
    content: bytes = file.read(info.size)
    if len(content) < info.size:
        raise UnreadableShardError(f"the tar is damaged or truncated: the file ends within {info.name!r}")
    return content


def _field(value: Any, path: str) -> Any:
    """Returns a field of parsed JSON, such as `meta.label`; None if missing."""
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _scalar(value: Any, kind: str | None) -> pa.Scalar:
    """Returns a field of JSON to carry: as JSON text without a type, which depends on the other samples."""
    if value is not None and (kind is None or isinstance(value, list | dict)):
        value = json.dumps(value)
    elif isinstance(value, int) and value.bit_length() > 63:  # for example, a hash
        value = str(value)
    return pa.scalar(value)
