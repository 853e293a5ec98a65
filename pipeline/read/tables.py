"""Tables of image URIs: their rows, in shards of 1,000 rows."""

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from pipeline.read.shards import Shard


def encode_rows(rows: pa.Table) -> bytes:
    """Returns rows as a compressed Arrow stream, for `Shard.rows`."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, rows.schema, options=options) as writer:
        writer.write_table(rows.combine_chunks())
    return bytes(sink.getvalue())


def decode_rows(rows: bytes) -> pa.Table:
    """Returns the rows of `Shard.rows`.

    The columns are `uri` (null if the row has no valid URI), `problem` (why not), `version` (null if unknown),
    `key`, `label` if there is a label column, and a struct `carried` with the columns of `input.carry`. The
    metadata of the field `label` has the dataset's own class names.
    """
    return pa.ipc.open_stream(rows).read_all()


def select_rows(shard: Shard, indices: Sequence[int]) -> Shard:
    """Returns the shard of a table with only the rows at these indices, with the same URI and version."""
    return replace(shard, rows=encode_rows(decode_rows(shard.rows).take(pa.array(indices, pa.int64()))))
