"""Members of a tar, from headers of limited size.

Of `tarfile`, only the parser of one block is used. `tarfile` reads extended headers of any size, needs
quadratic time and memory for some PAX records, and silently ends a tar at a damaged header.
"""

import io
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from pipeline.read.samples import UnreadableShardError

BLOCK_BYTES = tarfile.BLOCKSIZE
_MAX_HEADER_BYTES = 1024**2  # per member: long names, PAX records and sparse maps
_MAX_LINKED, _MAX_NAME = 100_000, 1000  # number of files to which hard links may refer, length of a name
#: The PAX keyword of an extended header whose content is one value, by type.
_LONG_VALUES = {tarfile.GNUTYPE_LONGNAME: b"path", tarfile.GNUTYPE_LONGLINK: b"linkpath"}
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
#: The types of members whose content is stored as it is.
PLAIN_TYPES = {*tarfile.REGULAR_TYPES} - {tarfile.GNUTYPE_SPARSE}
_EXTENDED_TYPES = (*_LONG_VALUES, *_PAX_TYPES, tarfile.XGLTYPE)  # global headers name no member


class TarEndError(UnreadableShardError):
    """The tar has no end, or data follows its end; every member before it is complete."""


class PartEndError(UnreadableShardError):
    """A part of a tar does not end where it should: the part may have started in a tar inside the tar."""


def read_members(
    stream: BinaryIO, start: int = 0, stop: int | None = None, links: bool = False
) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar; the caller may move the stream to the content of a member.

    Reads from byte `start` to the end of the tar, or to byte `stop`, where a member must start. The attribute
    `offset` of a member is the position of its first header, also of an extended one.

    With `links`, a hard link to an earlier file becomes a regular file with this content, before its header.

    Raises:
        UnreadableShardError: A header is damaged or too large, the tar does not end with a block of zeros, or
            data follows the end, or no member starts at `stop`.
    """
    position, files = start, dict[str, tuple[int, int]]()
    while (stop is None or position < stop) and (info := _read_member(stream, position)) is not None:
        has_content = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        position = info.offset_data + (_padded(info.size) if has_content else 0)
        if info.islnk() and info.linkname in files:
            info.type, (info.offset_data, info.size) = tarfile.REGTYPE, files[info.linkname]
        if links and info.type in PLAIN_TYPES and len(files) < _MAX_LINKED and len(info.name) < _MAX_NAME:
            files[info.name] = info.offset_data, info.size
        yield info
    if stop is not None and position != stop:
        cause = f"no member starts at byte {stop}, the end of this part, as with a tar inside the tar"
        raise PartEndError(f"{cause}; set read.split_bytes to null, which also replaces the other parts")
    while stop is None and (block := stream.read(1024**2)):
        if block.count(b"\0") != len(block):
            cause = "a block was overwritten with zeros, or several tars were concatenated without tar -A"
            error = PartEndError if start else TarEndError
            raise error(f"the tar is damaged: data follows the end of the tar ({cause})")


def _read_member(stream: BinaryIO, start: int) -> tarfile.TarInfo | None:
    """Returns the member whose headers start at a position; None at the end of the tar."""
    stream.seek(start)
    block = stream.read(BLOCK_BYTES)
    if block == bytes(BLOCK_BYTES):
        return None
    if not block and 0 < start == stream.seek(0, io.SEEK_END):
        raise TarEndError(f"the tar is damaged or truncated at byte {start}: no end (a block of zeros)")
    info, records = _parse_block(block, start), dict[bytes, bytes]()
    while info.type in _EXTENDED_TYPES:
        content = _read_header(stream, start, info.size)
        if info.type in _PAX_TYPES:
            records |= _pax_records(content)
        elif info.type in _LONG_VALUES:
            records[_LONG_VALUES[info.type]] = content.partition(b"\0")[0]
        block = _read_header(stream, start, BLOCK_BYTES)
        info = _parse_block(block, stream.tell() - BLOCK_BYTES)
    has_more = info.type == tarfile.GNUTYPE_SPARSE and block[482]
    while has_more:
        has_more = _read_header(stream, start, BLOCK_BYTES)[504]
    name = records.get(b"GNU.sparse.name", records.get(b"path"))
    if name is not None:
        info.name = name.decode(errors="backslashreplace").rstrip("/")  # names stay distinct
    info.linkname = records.get(b"linkpath", info.linkname.encode()).decode(errors="backslashreplace")
    size = records.get(b"size", b"%d" % info.size)
    if not size.isdigit() or len(size) > 18:
        cause = f"the size of the member at byte {start} is {size[:20].decode(errors='replace')!r}"
        raise UnreadableShardError(
            f"the tar is damaged: {cause}, not a number of bytes; create the tar again"
        )
    info.size = int(size)
    if any(keyword.startswith(b"GNU.sparse.") for keyword in records):
        info.type = tarfile.GNUTYPE_SPARSE
    info.offset, info.offset_data = start, stream.tell()
    return info


def _parse_block(block: bytes, position: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError as error:
        if position == 0:
            kinds = "uncompressed, or with gzip, bzip2, xz, zstd or lz4"
            problem = "the first header is invalid" if block else "it is empty"
            raise UnreadableShardError(f"not a tar ({kinds}): {problem}") from error
        raise UnreadableShardError(f"the tar is damaged or truncated at byte {position}: {error}") from error


def _read_header(stream: BinaryIO, start: int, size: int) -> bytes:
    """Reads a header of the member at `start`, with all its headers within the limit."""
    if not 0 <= size <= _MAX_HEADER_BYTES - (stream.tell() - start):
        raise UnreadableShardError(f"the headers of the member at byte {start} have more than 1 MiB")
    content = stream.read(_padded(size))[:size]
    if len(content) < size:
        raise UnreadableShardError(f"the tar is damaged or truncated: the header at byte {start} is cut off")
    return content


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    """Parses PAX records: `<length> <keyword>=<value>` and a line break."""
    records, position = dict[bytes, bytes](), 0
    while position < len(content) and content[position]:  # some writers pad with NULs
        digits, _, _ = content[position : position + 8].partition(b" ")
        end = position + (int(digits) if digits.isdigit() else 0)
        keyword, separator, value = content[position + len(digits) + 1 : end - 1].partition(b"=")
        if not separator or content[end - 1 : end] != b"\n":
            raise UnreadableShardError("the tar is damaged: a PAX record is invalid")
        records[keyword] = value
        position = end
    return records


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
