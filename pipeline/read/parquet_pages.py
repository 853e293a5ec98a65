"""Checks the headers of Parquet pages before Arrow decodes the pages.

Arrow allocates what a page header claims: a page of some kilobytes may become gigabytes. The headers pass
through the file that Arrow reads from, so that the check needs no further request.
"""

from typing import Any

from pipeline.read.limits import Deadline, TimedFile
from pipeline.read.samples import UnreadableShardError, describe_excess

_MAX_FOOTER_BYTES = 16 * 1024**2  # Arrow needs up to 250 times as much memory
_MAX_HEADER_BYTES = 16 * 1024**2  # as Arrow; some writers store whole values as minimum and maximum
_BYTES_PER_VALUE = 20  # of Arrow's decoders


class PageCheckedFile(TimedFile):
    """A Parquet file whose reads fail if the footer or a page is too large.

    Arrow reads a column chunk from its start and without gaps. The positions of the chunks are not taken from
    the footer: for some damaged footers, pyarrow's methods for column chunks abort the process.

    Attributes:
        has_footer: Whether the footer has been read, so that further reads are pages.
    """

    def __init__(self, file: Any, deadline: Deadline, max_page_bytes: int) -> None:
        super().__init__(file, deadline)
        self._max_page_bytes = max_page_bytes
        self.has_footer = False
        # By the position of the next read: possible positions of the next page header, with its first bytes.
        self._pages: dict[int, set[tuple[int, bytes]]] = {}

    def read(self, size: int = -1) -> bytes:
        """Reads a range, and checks the page headers in the range."""
        if not self.has_footer and not 0 <= size <= _MAX_FOOTER_BYTES:
            raise UnreadableShardError(f"the footer {describe_excess(size, _MAX_FOOTER_BYTES)}")
        position = self._file.tell()
        content = super().read(size)
        if self.has_footer:
            checked = set()
            continued = self._pages.pop(position, set())
            for page, head in continued | {(position, b"")}:  # the read may also start another column chunk
                try:
                    checked.add(self._check_pages(page, head, position, content))
                except (ValueError, KeyError):
                    if (page, head) in continued or not continued:
                        raise
            self._pages[position + len(content)] = checked
        return content

    def _check_pages(self, page: int, head: bytes, position: int, content: bytes) -> tuple[int, bytes]:
        """Checks the pages in a range, given the position of the first header; returns that of the next."""
        content, position = head + content, position - len(head)
        while page < position + len(content):
            self._deadline.check()
            try:
                page += self._check_page(content, page - position, page)
            except IndexError:  # the next read has the rest of the header
                break
        head = content[page - position :]
        if len(head) > _MAX_HEADER_BYTES:
            raise ValueError(f"the header of the page at byte {page} is too large")
        return page, head

    def _check_page(self, data: bytes, at: int, position: int) -> int:
        """Checks the page whose header is at `at`; returns the size of the page with its header."""
        # The header is a struct in Thrift's compact protocol. Its first fields are integers (0x15): type,
        # sizes and a checksum. A struct (0x.c) by the type of the page follows, whose first is an integer.
        begin, numbers, values = at, list[int](), 0
        while data[at] == 0x15:
            number, at = _read_varint(data, at + 1)
            numbers.append(number // 2)
        while (head := data[at]) or len(numbers) < 3:
            if len(numbers) < 3 or head < 16 or head & 15 != 12:
                raise ValueError(f"the header of the page at byte {position} is invalid")
            if data[at + 1] == 0x15:
                values = _read_varint(data, at + 2)[0] // 2
            at = _skip(data, at + 1, 12)
        size = max(*numbers[1:3], _BYTES_PER_VALUE * values)
        if size > self._max_page_bytes:
            excess = describe_excess(size, self._max_page_bytes)
            hint = "write the file with smaller pages, or raise read.max_page_bytes"
            raise UnreadableShardError(f"the page at byte {position} {excess}; {hint}")
        return at + 1 - begin + numbers[2]


def _skip(data: bytes, at: int, kind: int) -> int:
    """Returns the position after a value of Thrift; raises `IndexError` if the value is incomplete."""
    if kind == 12:  # a struct: each field has its type and the difference of its number, or its number
        while head := data[at]:
            at = _skip(data, at + 1 if head > 15 else _read_varint(data, at + 1)[1], head & 15)
        return at + 1
    if kind in (9, 10):  # a list or set; a boolean in a list is a byte
        count, element = data[at] >> 4, max(3, data[at] & 15)
        count, at = _read_varint(data, at + 1) if count == 15 else (count, at + 1)
        for _ in range(count):
            at = _skip(data, at, element)
    elif kind in (4, 5, 6):  # an integer
        at = _read_varint(data, at)[1]
    elif kind == 8:  # a string
        length, at = _read_varint(data, at)
        at += length
    else:  # a boolean, a byte, a floating-point number
        at += {1: 0, 2: 0, 3: 1, 7: 8}[kind]
    if at > len(data):
        raise IndexError
    return at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 128 and shift < 63:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1
