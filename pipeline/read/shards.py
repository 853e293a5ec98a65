"""Listing of shards, from the names, sizes and versions of objects."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain, pairwise
from typing import Literal, Self

from pipeline.config import InputConfig, InputFormat
from pipeline.read.table_files import is_table_name
from pipeline.storage import ObjectInfo, Storage, relative_name
from pipeline.text import pluralize

Format = Literal["webdataset", "parquet", "images", "table"]

#: File name extensions of images, without the dot, in lower case.
IMAGE_EXTENSIONS = frozenset(
    ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl"]
)
_IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
_MEAN_GROUP_SIZE = 1000
_FIRST_GROUP = "0" * 16
#: Number of ignored objects whose URIs a listing keeps, by reason.
MAX_IGNORED_EXAMPLES = 100
_MAX_EXTENSIONS = 50
_EXTENSION = re.compile(r"[^./](\.tar)?(\.[a-z0-9]{1,16})?$")


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of reading, commit and resume.

    Attributes:
        uri: URI of the object; for a group of image files, `<listed folder>/images-<16 hex digits>`.
        version: Version of the object; for a group, a hash over the names and versions of the members.
        size: Size in bytes; for a group, the sum over the members.
        members: The images of a group in listing order; empty for other shards.
        rows: The rows of a range of a table, see `pipeline.read.tables`; empty for other shards.
        span: Start and end of a part of a large object: rows of a Parquet file, or bytes of a tar.
        file: The object that the shard, or this part of it, is in; None if `uri` and `version` are its own.
    """

    uri: str
    version: str
    format: Format
    size: int
    members: tuple[ObjectInfo, ...] = ()
    rows: bytes = b""
    span: tuple[int, int] | None = None
    file: ObjectInfo | None = None

    @property
    def object(self) -> ObjectInfo:
        """The object to read, in its own version; not for groups of image files and tables."""
        return self.file or ObjectInfo(self.uri, self.size, self.version)


class IgnoreReason(StrEnum):
    """The reasons for which an object of the input is ignored."""

    HIDDEN = "hidden name"  # a part of the name starts with `.` or `_`
    FORMAT = "other format"  # by the extension, or not of the configured format
    OLD_VERSION = "old version"  # in an S3 Inventory; also delete markers
    METADATA = "metadata of a tar"  # `x.parquet` and `x_stats.json` of `x.tar`, as img2dataset writes them


class ShardListing(Iterator[Shard]):
    """Iterates over the shards among listed objects.

    Attributes:
        format: The only format that is listed; None for all formats.
        ignored, ignored_extensions: Number of ignored objects so far, by reason, and also by extension.
        ignored_examples: URIs of the first `MAX_IGNORED_EXAMPLES` ignored objects, by reason.
    """

    def __init__(self, objects: Iterable[ObjectInfo], uri: str, format: Format | None = None) -> None:
        self.uri = uri
        self.format = format
        self.ignored = Counter[IgnoreReason]()
        self.ignored_extensions = Counter[tuple[IgnoreReason, str]]()
        self.ignored_examples = defaultdict[IgnoreReason, list[str]](list)
        self._shards = self._find(objects)

    def __next__(self) -> Shard:
        return next(self._shards)

    def require_shards(self, field: str) -> Self:
        """Returns this listing; raises `NoShardsError` with the field of the URI if it has no shard."""
        first = next(self._shards, None)
        if first is None:
            ignored = f" ({pluralize(self.ignored.total(), 'object')} ignored)" if self.ignored else ""
            raise NoShardsError(
                f"{field}: no shards found in {self.uri}{ignored}; "
                "expected .tar, .tar.gz or .parquet objects, or images"
            )
        self._shards = chain([first], self._shards)
        return self

    def ignore(self, uri: str, reason: IgnoreReason) -> None:
        """Counts an ignored object."""
        self.ignored[reason] += 1
        found, key = self.ignored_extensions, (reason, file_extension(uri))
        found[key if key in found or len(found) < _MAX_EXTENSIONS else (reason, "others")] += 1
        if self.ignored[reason] <= MAX_IGNORED_EXAMPLES:
            self.ignored_examples[reason].append(uri)

    def replace(self, change: Callable[[Iterator[Shard]], Iterator[Shard]]) -> Self:
        """Replaces the shards, such as the files of tables, by their parts."""
        self._shards = change(self._shards)
        return self

    def _find(self, objects: Iterable[ObjectInfo]) -> Iterator[Shard]:
        """Yields the shards; splits the image files into groups of about a thousand by their names.

        An image whose name hashes to 0 modulo 1000 starts a new group, which is named after the hash. An
        image that is added or removed therefore changes one group or two. This is content-defined chunking
        over names (Muthitacharoen et al., "A Low-bandwidth Network File System", 2001). One group in 150 has
        5,000 images, one in 20,000 has 10,000.
        """
        group, members = _FIRST_GROUP, list[ObjectInfo]()
        last_tar = ""
        for info, following in pairwise(chain(objects, [None])):
            assert info is not None
            name = relative_name(self.uri, info.uri)
            last_tar = info.uri if name.endswith(".tar") else last_tar
            stem = info.uri.removesuffix(".parquet").removesuffix("_stats.json")
            neighbors = last_tar, following.uri if following is not None else ""
            format, reason = _format(name, self.format), IgnoreReason.FORMAT
            is_hidden = any(part.startswith((".", "_")) for part in name.split("/"))
            if is_hidden and info.uri != self.uri:
                format, reason = None, IgnoreReason.HIDDEN
            elif self.format == "table" and info.uri == self.uri:
                format = "table"
            elif self.format in (None, "webdataset") and stem != info.uri and f"{stem}.tar" in neighbors:
                format, reason = None, IgnoreReason.METADATA
            if format is None:
                self.ignore(info.uri, reason)
            elif format != "images":
                yield Shard(info.uri, info.version, format, info.size)
            else:
                digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
                # Boundaries and names use different halves of the hash: at each boundary, the remainder of
                # the second half is 0.
                if int(digest[16:], 16) % _MEAN_GROUP_SIZE == 0:
                    if members:
                        yield _group(self.uri, group, members)
                    group, members = digest[:16], []
                members.append(info)
        if members:
            yield _group(self.uri, group, members)


def list_shards(
    storage: Storage, uri: str, format: InputFormat = "auto", section: InputConfig | None = None
) -> ShardListing:
    """Lists the shards at a normalized URI: one object, or all objects under a folder.

    The listing streams, and each step may raise `StorageError`. Objects are ignored if a part of their name
    starts with `.` or `_` (`_SUCCESS`, `.DS_Store`, `__MACOSX/`), except in `uri` itself. With the format
    `auto`, the extension determines the format. With `webdataset` or `parquet`, every object is a shard. With
    `table`, `section` has the settings of tables, and a step may also raise `ConfigError`.
    """
    objects = storage.list(uri, missing_ok=False)
    listing = ShardListing(objects, uri, None if format == "auto" else format)
    if format != "table":
        return listing
    from pipeline.read.tables import list_tables  # imports this module

    section = section or InputConfig(uri=uri, format=format)
    return listing.replace(lambda files: list_tables(storage, section, files, listing.ignore))


def file_extension(name: str) -> str:
    """Returns the extension of a name in lower case, such as `.jfif` or `.tar.zst`; `none` without one."""
    found = _EXTENSION.search(name.lower())
    return "".join(part or "" for part in found.groups()) if found and any(found.groups()) else "none"


def _format(name: str, required: Format | None) -> Format | None:
    """Returns the format of an object; None if the object is ignored."""
    lower = name.lower()
    is_image = lower.endswith(_IMAGE_SUFFIXES)
    if required == "table":
        return required if is_table_name(lower) else None
    if required is not None:
        return required if required != "images" or is_image else None
    if lower.endswith((".tar", ".tar.gz", ".tgz")):
        return "webdataset"
    if lower.endswith(".parquet"):
        return "parquet"
    return "images" if is_image else None


def _group(folder: str, name: str, members: list[ObjectInfo]) -> Shard:
    version = hashlib.blake2b(digest_size=16)
    for info in members:
        version.update(f"{info.uri}\0{info.version}\0".encode())
    size = sum(info.size for info in members)
    return Shard(f"{folder}/images-{name}", version.hexdigest(), "images", size, tuple(members))


class NoShardsError(ValueError):
    """The input has no shards."""


def list_input_shards(storage: Storage, section: InputConfig, field: str) -> list[Shard]:
    """Returns all shards of an input. Raises the same errors as `ShardListing.require_shards`."""
    return list(list_shards(storage, section.uri, section.format, section).require_shards(field))
