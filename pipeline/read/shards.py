"""Listing of shards, from the names, sizes and versions of objects."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain, pairwise
from posixpath import splitext
from typing import Literal, Self

from pipeline.config import InputUris
from pipeline.storage import ObjectInfo, is_under, relative_name
from pipeline.text import pluralize

Format = Literal["webdataset", "parquet", "images", "table"]

#: File name extensions of images, without the dot, in lower case.
IMAGE_EXTENSIONS = frozenset(
    ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl"]
)
#: Endings of the names of tars. The content determines the compression.
TAR_SUFFIXES = (
    ".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz",
    ".tar.lz4",
)  # fmt: skip
TABLE_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt")
_TABLE_COMPRESSION = re.compile(r"\.(gz|zst|bz2|xz|lz4)$", re.I)
_SUFFIXES: dict[Format, tuple[str, ...]] = {
    "webdataset": TAR_SUFFIXES,
    "parquet": (".parquet",),
    "images": tuple(f".{extension}" for extension in sorted(IMAGE_EXTENSIONS)),
    "table": TABLE_SUFFIXES,
}
_AUTO_FORMATS: tuple[Format, ...] = ("webdataset", "parquet", "images")
_MEAN_GROUP_SIZE = 1000
_FIRST_GROUP = "0" * 16
#: Number of ignored objects whose URIs a listing keeps, by reason.
MAX_IGNORED_EXAMPLES = 100
_MAX_EXTENSIONS, _SHOWN_EXTENSIONS = 50, 8
_END = ObjectInfo("", 0, ""), "", ""  # follows the last object
_EXTENSION = re.compile(r"[^./](\.tar)?(\.[a-z0-9]{1,16})?$")


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of reading, commit and resume.

    Attributes:
        uri: URI of the object; for a group of image files, `<listed folder>/images-<16 hex digits>`,
            with 16 more for patterns, see `InputUris.group_suffix`.
        version: Version of the object; for a group, a hash over the names and versions of the members.
        size: Size in bytes; for a group, the sum over the members.
        members: The images of a group in listing order; empty for other shards.
        rows, row_count: The rows of a range of a table, see `pipeline.read.tables`; empty for other shards.
        span: Start and end of a part of a large object: rows of a Parquet file, or bytes of a tar.
        file: The object that the shard, or this part of it, is in; None if `uri` and `version` are its own.
            For a range of rows, the table: its file, or the folder of a Delta or Iceberg table.
    """

    uri: str
    version: str
    format: Format
    size: int
    members: tuple[ObjectInfo, ...] = ()
    rows: bytes = b""
    row_count: int = 0
    span: tuple[int, int] | None = None
    file: ObjectInfo | None = None

    @property
    def images(self) -> int | None:
        """Number of images, if the listing gives it: of groups of image files and of tables."""
        return len(self.members) or self.row_count or None

    @property
    def object(self) -> ObjectInfo:
        """The object to read, in its own version; not for groups of image files. Of a table, only the URI."""
        return self.file or ObjectInfo(self.uri, self.size, self.version)


class IgnoreReason(StrEnum):
    """The reasons for which an object of the input is ignored."""

    HIDDEN = "hidden name"  # a part of the name starts with `.` or `_`
    EXCLUDED = "excluded"  # by `input.exclude`
    FORMAT = "other format"  # by the extension, or not of the configured format
    OLD_VERSION = "old version"  # in an S3 Inventory; also delete markers
    METADATA = "metadata of a tar"  # `x.parquet` and `x_stats.json` of `x.tar`, as img2dataset writes them


class ShardListing(Iterator[Shard]):
    """Iterates over the shards among listed objects.

    Attributes:
        inputs: The URIs and patterns that select objects; others are neither shards nor ignored.
        format: The only format that is listed; None for all formats.
        tables: Tables whose current snapshot is listed, so far.
        ignored, ignored_extensions: Number of ignored objects so far, by reason, and also by extension.
        ignored_examples: URIs of the first `MAX_IGNORED_EXAMPLES` ignored objects, by reason.
    """

    def __init__(
        self,
        objects: Iterable[ObjectInfo],
        inputs: InputUris | str,
        format: Format | None = None,
        tables: Set[str] = frozenset(),
    ) -> None:
        self.inputs = InputUris.parse(inputs) if isinstance(inputs, str) else inputs
        self.format, self.tables = format, tables
        self.ignored = Counter[IgnoreReason]()
        self.ignored_extensions = Counter[tuple[IgnoreReason, str]]()
        self.ignored_examples = defaultdict[IgnoreReason, list[str]](list)
        # The URIs that must have an object: a URI that does not exist may be a mistake.
        self._unused = {uri for each in self.inputs.patterns for uri in each.names or {each.text}}
        self._count = len(self._unused)
        self._shards = self._find(self._selected(objects))

    def __next__(self) -> Shard:
        return next(self._shards)

    def require_shards(self, field: str) -> Self:
        """Returns this listing; raises `NoShardsError` with the field of the URI if it has no shard.

        The returned listing raises the error at its end if one of several URIs or patterns has no object.
        """
        shards = self._required(field, self._shards)
        self._shards = chain([next(shards)], shards)
        return self

    def _required(self, field: str, shards: Iterator[Shard]) -> Iterator[Shard]:
        is_empty = True
        for shard in shards:
            is_empty = False
            yield shard
        if self._unused and self._count > 1:
            first, unused = ", ".join(sorted(self._unused)[:3]), len(self._unused)
            first += ", ..." if unused > 3 else ""
            raise NoShardsError(f"{field}: {unused:,} of {self._count:,} URIs have no object: {first}")
        if not is_empty:
            return
        if self.tables:
            raise NoShardsError(f"{field}: the table has no rows: {', '.join(sorted(self.tables))}")
        ignored = f" (ignored: {self.describe_ignored()})" if self.ignored else ""
        formats = [self.format] if self.format else _AUTO_FORMATS
        expected = ", ".join(suffix for format in formats for suffix in _SUFFIXES[format])
        if self.format == "table":
            expected = f"rows that input.filter selects in {expected}"
        if any(uri.endswith("/manifest.json") for uris in self.ignored_examples.values() for uri in uris):
            expected += "; of an S3 Inventory, set input.uri to its manifest.json, and input.format to table"
        expected += "; to read an object with another name, set input.uri to it, and input.format"
        raise NoShardsError(f"{field}: no shards found in {self.inputs}{ignored}; expected {expected}")

    def ignore(self, uri: str, reason: IgnoreReason) -> None:
        """Counts an ignored object."""
        self.ignored[reason] += 1
        found, key = self.ignored_extensions, (reason, file_extension(uri))
        found[key if key in found or len(found) < _MAX_EXTENSIONS else (reason, "others")] += 1
        if self.ignored[reason] <= MAX_IGNORED_EXAMPLES:
            self.ignored_examples[reason].append(uri)

    def describe_ignored(self) -> str:
        """Describes the ignored objects of the input: the number in total, by reason and by extension."""
        extensions = Counter[str]()
        for (_, extension), count in self.ignored_extensions.items():
            extensions[extension] += count
        total = pluralize(self.ignored.total(), "object")
        if not self.ignored:
            return total
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(self.ignored.items()))
        shown = [f"{extension} {count:,}" for extension, count in extensions.most_common(_SHOWN_EXTENSIONS)]
        if len(extensions) > _SHOWN_EXTENSIONS:
            shown.append(f"{len(extensions) - _SHOWN_EXTENSIONS} more")
        return f"{total} ({reasons}), extensions: {', '.join(shown)}"

    def replace(self, change: Callable[[Iterator[Shard]], Iterator[Shard]]) -> Self:
        """Replaces the shards, such as the files of tables, by their parts."""
        self._shards = change(self._shards)
        return self

    def _selected(self, objects: Iterable[ObjectInfo]) -> Iterator[tuple[ObjectInfo, str, str]]:
        """Yields each selected object, the URI that selects it, see `UriPattern.match`, and its root."""
        root = ""
        for info in objects:
            if not root or not is_under(info.uri, root):
                root = self.inputs.root_of(info.uri)
            if matches := self.inputs.matches(root, info.uri):
                self._unused -= {*matches, *matches.values()}
                yield info, max(matches.values(), key=len), root

    def _find(self, selected: Iterable[tuple[ObjectInfo, str, str]]) -> Iterator[Shard]:
        """Yields the shards; splits the image files of a root into groups of about a thousand by their names.

        An image whose name hashes to 0 modulo 1000 starts a new group, which is named after the hash. An
        image that is added or removed therefore changes one group or two. This is content-defined chunking
        over names (Muthitacharoen et al., "A Low-bandwidth Network File System", 2001). One group in 150 has
        5,000 images, one in 20,000 has 10,000.
        """
        group, members = _FIRST_GROUP, list[ObjectInfo]()
        root = last_tar = ""
        for (info, base, listed), following in pairwise(chain(selected, [_END])):
            format = self._format(info.uri, base, listed, (last_tar, following[0].uri))
            last_tar = info.uri if info.uri.endswith(TAR_SUFFIXES) else last_tar
            name = relative_name(listed, info.uri)
            digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest() if format == "images" else ""
            # Boundaries and names use different halves of the hash: at each boundary, the remainder of the
            # second half is 0.
            is_boundary = digest != "" and int(digest[16:], 16) % _MEAN_GROUP_SIZE == 0
            if members and (listed != root or is_boundary):
                yield self._group(root, group, members)
                members = []
            if listed != root or is_boundary:
                group = digest[:16] if is_boundary else _FIRST_GROUP
            root = listed
            if format == "images":
                members.append(info)
            elif isinstance(format, IgnoreReason):
                self.ignore(info.uri, format)
            else:
                yield Shard(info.uri, info.version, format, info.size)
        if members:
            yield self._group(root, group, members)

    def _group(self, root: str, name: str, members: list[ObjectInfo]) -> Shard:
        version = hashlib.blake2b(digest_size=16)
        for info in members:
            version.update(f"{info.uri}\0{info.version}\0".encode())
        uri = f"{root}/images-{name}{self.inputs.group_suffix(root)}"
        size = sum(info.size for info in members)
        return Shard(uri, version.hexdigest(), "images", size, tuple(members))

    def _format(self, uri: str, base: str, root: str, neighbors: Iterable[str]) -> Format | IgnoreReason:
        """Returns the format of an object that `base` selects, or why it is ignored."""
        if self.inputs.excludes(root, uri):
            return IgnoreReason.EXCLUDED
        if uri == base and self.format is not None:
            return self.format
        if any(part.startswith((".", "_")) for part in uri[len(base) + 1 :].split("/")):
            return IgnoreReason.HIDDEN
        stem = uri.removesuffix(".parquet").removesuffix("_stats.json")
        if stem != uri != base and any(each.removeprefix(stem) in TAR_SUFFIXES for each in neighbors):
            return IgnoreReason.METADATA
        name = _TABLE_COMPRESSION.sub("", uri) if self.format == "table" else uri
        for format in [self.format] if self.format else _AUTO_FORMATS:
            if name.lower().endswith(_SUFFIXES[format]):
                return format
        return IgnoreReason.FORMAT


def table_suffix(name: str) -> str:
    """Returns the ending of a table's name in lower case, without compression: `.csv` for `a.CSV.gz`."""
    return splitext(_TABLE_COMPRESSION.sub("", name.lower()))[1]


def file_extension(name: str) -> str:
    """Returns the extension of a name in lower case, such as `.jfif` or `.tar.zst`; `none` without one."""
    found = _EXTENSION.search(name.lower())
    return "".join(part or "" for part in found.groups()) if found and any(found.groups()) else "none"


class NoShardsError(ValueError):
    """The input has no shards."""
