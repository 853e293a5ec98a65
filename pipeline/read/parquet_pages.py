"""Checks sizes in a Parquet file before Arrow allocates memory: a page of kilobytes may claim gigabytes."""

from typing import Any

from pipeline.read.limits import Deadline, TimedFile
from pipeline.read.samples import UnreadableShardError, describe_excess

_MAX_FOOTER_BYTES = 16 * 1024**2  # Arrow needs up to 250 times as much memory
_MAX_HEADER_BYTES = 16 * 1024**2  # as Arrow; some writers store whole values as minimum and maximum
_BYTES_PER_VALUE = 20  # of Arrow's decoders

# Numbers of fields in a page header, and types of fields in Thrift's compact protocol.
_UNCOMPRESSED_SIZE, _COMPRESSED_SIZE, _MAX_FIELD = 2, 3, 15
_BOOLEANS, _INTEGERS, _BINARY, _STRUCT = (1, 2), (4, 5, 6), 8, 12
_KINDS = (*_BOOLEANS, *_INTEGERS, _BINARY, _STRUCT)


class FooterFile(TimedFile):
    """A Parquet file from which Arrow reads only the footer; fails if the footer is too large.

    Hides the Arrow schema of the writer. With the schema, each row of a dictionary has all values of the
    dictionary, and time zones may be unknown.
    """

    def read(self, size: int = -1) -> bytes:
        """Reads a range of the footer."""
        if not 0 <= size <= _MAX_FOOTER_BYTES:
            raise UnreadableShardError(f"the footer {describe_excess(size, _MAX_FOOTER_BYTES)}")
        return super().read(size).replace(b"ARROW:schema", b"hidden:Arrow")


class ColumnChunkFile(TimedFile):
    """A Parquet file from which Arrow reads column chunks, each from its start and without gaps.

    A read fails if a page header in the range has a size over the limit.
    """

    def __init__(self, file: Any, deadline: Deadline, max_page_bytes: int, column: str) -> None:
        super().__init__(file, deadline)
        self._max_page_bytes = max_page_bytes
        self._column = column
        self.start_chunk()

    def start_chunk(self) -> None:
        """Expects the start of a column chunk at the next read."""
        self._head = b""  # the start of a header that the next read completes
        self._next_page = 0  # where the next header starts, from the start of `_head` and the next read

    def read(self, size: int = -1) -> bytes:
        """Reads a range of the column chunk, and checks the page headers in the range."""
        content = super().read(size)
        data, page = self._head + content, self._next_page
        try:
            while page < len(data):
                page = self._check_page(data, page)
            self._head, self._next_page = b"", page - len(data)
        except IndexError:  # the next read has the rest of the header
            self._head, self._next_page = data[page:], 0
        except (KeyError, TypeError, ValueError, RecursionError):
            raise UnreadableShardError(
                f"the header of a page of column {self._column!r} is invalid"
            ) from None
        if len(self._head) > _MAX_HEADER_BYTES:
            raise UnreadableShardError(f"the header of a page of column {self._column!r} is too large")
        return content

    def _check_page(self, data: bytes, start: int) -> int:
        """Checks the page whose header starts at a position; returns the position after the page."""
        header, end = _read_struct(data, start)
        # The struct for the type of the page has the number of values as its first field.
        values = max(part[1] for part in header.values() if isinstance(part, dict))
        size = max(header[_UNCOMPRESSED_SIZE], header[_COMPRESSED_SIZE], _BYTES_PER_VALUE * values)
        if size > self._max_page_bytes:
            excess = describe_excess(size, self._max_page_bytes)
            hint = "write the file with smaller pages, or raise read.max_page_bytes"
            raise UnreadableShardError(f"a page of column {self._column!r} {excess}; {hint}")
        return int(end + header[_COMPRESSED_SIZE])


def _read_struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Returns the integers and structs of a Thrift struct by field number, and the end of the struct.

    Raises `IndexError` if the data ends before the struct, and `ValueError` if no page header has the field.
    """
    fields, field = dict[int, Any](), 0
    while head := data[at]:
        difference, kind = divmod(head, 16)
        field, at = field + difference, at + 1
        if difference == 0 or field > _MAX_FIELD or kind not in _KINDS:
            raise ValueError("unknown field")
        if kind in _INTEGERS:
            number, at = _read_varint(data, at)
            fields[field] = number // 2
        elif kind == _STRUCT:
            fields[field], at = _read_struct(data, at)
        elif kind == _BINARY:
            length, at = _read_varint(data, at)
            at += length
    return fields, at + 1


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 128 and shift < 63:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1
