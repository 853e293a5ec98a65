"""Shards, found in a listing of the input by names, sizes and versions. Nothing is read here."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Literal, Self

from pipeline.config import InputConfig, InputFormat
from pipeline.storage import ObjectInfo, Storage, relative_name

Format = Literal["webdataset", "parquet", "images"]

#: File name extensions of the image formats, as they stand after the dot, in lower case.
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff"})
_IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
_GROUP_IMAGES = 1000  # a group's mean
_FIRST_GROUP = "0" * 16


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of reading, of commit and of resume.

    Attributes:
        uri: of the object; for a group of image files `<listed folder>/images-<16 hex digits>`.
        version: of the object; for a group, a hash over its members' names and versions.
        size: in bytes; for a group, of all members together.
        members: a group's images in listing order, else empty. Their names under the listed folder
            are `relative_name(folder, member.uri)`, with the folder of the group's URI.
    """

    uri: str
    version: str
    format: Format
    size: int
    members: tuple[ObjectInfo, ...] = ()


class IgnoreReason(StrEnum):
    """Why an object of the input is not a shard."""

    HIDDEN = "hidden name"  # a part of the name starts with `.` or `_`
    FORMAT = "other format"  # by the extension, or not of the configured format


class ShardListing(Iterator[Shard]):
    """The shards among listed objects, found while iterating.

    Attributes:
        format: the only format that was looked for; None for all.
        ignored: number of objects that are not shards, by reason, so far.
    """

    def __init__(self, objects: Iterable[ObjectInfo], uri: str, format: Format | None = None) -> None:
        self.uri = uri
        self.format = format
        self.ignored = Counter[IgnoreReason]()
        self._shards = self._find(objects)

    def __next__(self) -> Shard:
        return next(self._shards)

    def require_shards(self) -> Self:
        """Returns this listing, after a look at the first shard; raises `NoShardsError` or `StorageError`."""
        first = next(self._shards, None)
        if first is None:
            others = f" ({self.ignored.total()} objects there are none)" if self.ignored else ""
            raise NoShardsError(
                f"{self.uri}: no shards found{others}; expected .tar, .tar.gz or .parquet objects, or images"
            )
        self._shards = chain([first], self._shards)
        return self

    def _find(self, objects: Iterable[ObjectInfo]) -> Iterator[Shard]:
        """Cuts the sorted image files among the objects into groups of about a thousand, by names alone.

        An image whose name hashes to 0 modulo 1000 starts a new group, which is named after that hash. An
        image that is added or removed changes its own group (or splits it, or joins it to the one before);
        every other group keeps its URI, members and version. This is content-defined chunking over names
        (Muthitacharoen et al., "A Low-bandwidth Network File System", 2001). Sizes are geometrically
        distributed: one group in 150 has 5,000 images, one in 20,000 has 10,000.
        """
        group, members = _FIRST_GROUP, list[ObjectInfo]()
        for info in objects:
            name = relative_name(self.uri, info.uri)
            is_hidden = _is_hidden(name) and info.uri != self.uri
            format = None if is_hidden else _format(name, self.format)
            if format is None:
                self.ignored[IgnoreReason.HIDDEN if is_hidden else IgnoreReason.FORMAT] += 1
            elif format != "images":
                yield Shard(info.uri, info.version, format, info.size)
            else:
                digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
                # Cut and name come from different halves: all names that cut have that half's remainder.
                if int(digest[16:], 16) % _GROUP_IMAGES == 0:
                    if members:
                        yield _group(self.uri, group, members)
                    group, members = digest[:16], []
                members.append(info)
        if members:
            yield _group(self.uri, group, members)


def list_shards(storage: Storage, uri: str, format: InputFormat = "auto") -> ShardListing:
    """Lists the shards at a normalized URI: one object, or everything under a folder. Streams.

    With `auto`, the extension decides, in any case: `.tar`, `.tar.gz` and `.tgz` are WebDataset,
    `.parquet` is Parquet, images are gathered into groups, anything else is ignored. With a format,
    every object is of that format; for `images`, every one with an image's extension. A name with a
    part that starts with `.` or `_` (`_SUCCESS`, `.DS_Store`, `__MACOSX/`) is always ignored, except
    in `uri` itself. Any step of the iteration may raise `StorageError`.
    """
    return ShardListing(storage.list(uri, missing_ok=False), uri, None if format == "auto" else format)


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _format(name: str, said: Format | None) -> Format | None:
    lower = name.lower()
    is_image = lower.endswith(_IMAGE_SUFFIXES)
    if said is not None:
        return said if said != "images" or is_image else None
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
    """The input has nothing to label."""


def list_input_shards(storage: Storage, section: InputConfig) -> list[Shard]:
    """Lists all shards of an input; raises `NoShardsError` or `StorageError`."""
    return list(list_shards(storage, section.uri, section.format).require_shards())
