"""Assembling a shard: the results of its chunks in, its prediction rows out, in the shard's order."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.predictions import PredictionOptions, prediction_schema
from pipeline.read import Chunk, Shard


class IncompleteShardError(RuntimeError):
    """The stream of results ended, or went wrong, before a shard was covered."""


@dataclass
class OpenShard:
    """The chunks of a shard that have arrived.

    Attributes:
        chunks: by the index of their first sample.
        total: the shard's number of samples, once its last chunk has arrived.
        transient: whether the cause of the error is the storage, not the shard.
        samples, encoded_bytes: of the chunks that have arrived.
    """

    chunks: dict[int, Chunk] = field(default_factory=dict)
    total: int | None = None
    error: str | None = None
    transient: bool = False
    samples: int = 0
    encoded_bytes: int = 0

    def add(self, chunk: Chunk) -> bool:
        """Keeps a chunk; False where a second attempt brought a chunk that is there already.

        A second attempt may fail earlier than the first, and reports this in place of a chunk that is there.
        """
        if chunk.start in self.chunks and chunk.error is None:
            return False
        self.chunks[chunk.start] = chunk
        self.samples += chunk.samples.num_rows
        self.encoded_bytes += chunk.encoded_bytes
        if chunk.total is not None:
            self.total, self.error, self.transient = chunk.total, chunk.error, chunk.transient
        return True

    @property
    def complete(self) -> bool:
        """Whether nothing more is to be waited for."""
        return self.error is not None or self.samples == self.total

    @property
    def errors(self) -> int:
        """Number of samples that are error rows."""
        return sum(map(count_errors, self.chunks.values()))

    def rows(self, shard: Shard, options: PredictionOptions) -> pa.Table:
        """The prediction rows of the complete shard.

        Raises:
            IncompleteShardError: the chunks leave gaps, or overlap.
        """
        chunks = [self.chunks[start] for start in sorted(self.chunks)]
        ends = np.cumsum([chunk.samples.num_rows for chunk in chunks])
        if [chunk.start for chunk in chunks] != [0, *ends[:-1].tolist()]:
            raise IncompleteShardError(f"{shard.uri}: its chunks leave gaps or overlap")
        samples = pa.concat_tables([chunk.samples for chunk in chunks])
        samples = samples.rename_columns({"target": "target_id"})
        samples = samples.append_column("shard", pa.repeat(shard.uri, samples.num_rows))
        samples = samples.append_column("index", pa.array(np.arange(samples.num_rows), pa.int64()))
        schema = prediction_schema(options.embedding, options.embedding_width)
        return samples.select(schema.names).cast(schema).combine_chunks()


def count_errors(chunk: Chunk) -> int:
    """Number of a chunk's samples that are error rows."""
    count: int = chunk.samples.num_rows - chunk.samples["error"].null_count
    return count
