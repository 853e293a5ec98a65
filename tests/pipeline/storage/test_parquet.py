"""Arrow's threads must not read Python files: a process that exits at that moment aborts."""

from __future__ import annotations

import io
import threading

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import read_row_groups, read_table


class RecordingFile(io.BytesIO):
    """A file that records the threads that read it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.threads: set[int] = set()

    def read(self, size: int | None = -1) -> bytes:
        self.threads.add(threading.get_ident())
        return super().read(size)


def test_only_the_calling_thread_reads_the_file() -> None:
    table = pa.table({f"c{i}": range(1000) for i in range(20)})
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=100)
    file = RecordingFile(out.getvalue())
    assert read_table(file).equals(table)
    assert pa.concat_tables(read_row_groups(file, ["c1", "c7"])).equals(table.select(["c1", "c7"]))
    assert file.threads == {threading.get_ident()}
    pq.read_table(file)
    assert file.threads != {threading.get_ident()}  # Arrow's own default uses threads
