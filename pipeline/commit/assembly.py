"""The committer: results of chunks in, one prediction file a shard out, in one atomic write.

What it holds is the open shards' result rows, never pixels. It runs in the driver and knows nothing of Ray.

The order of a commit:
 1. chunks of a shard are kept, by their first index, until they cover the shard, however they arrive;
 2. the file is assembled, in the shard's order, and encoded in memory;
 3. one atomic write makes it visible: before it there is no trace of the shard, after it the whole of it.
    It is conditional: it replaces what the plan has seen there, or else finds out whose is right;
 4. only then does the shard get a manifest row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.read import Chunk


class IncompleteShardError(RuntimeError):
    """The stream of results ended, or went wrong, before a shard was covered."""


@dataclass
class OpenShard:
    """The chunks of a shard that have arrived."""

    chunks: dict[int, Chunk] = field(default_factory=dict)
    total: int | None = None
    error: str | None = None
    transient: bool = False
    samples: int = 0
    encoded_bytes: int = 0

    def add(self, chunk: Chunk) -> bool:
        """Keeps a chunk; False where a second attempt brought one that is there already.

        A second attempt may fail earlier than the first, and says so in the place of a chunk that is there.
        """
        if chunk.start in self.chunks and chunk.error is None:
            return False
        self.chunks[chunk.start] = chunk
        self.samples += chunk.samples.num_rows
        if chunk.total is not None:
            self.total, self.error, self.transient = chunk.total, chunk.error, chunk.transient
        return True

    @property
    def complete(self) -> bool:
        return self.error is not None or self.samples == self.total


def count_errors(chunk: Chunk) -> int:
    return chunk.samples.num_rows - chunk.samples["error"].null_count
