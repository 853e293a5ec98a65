"""The chunk: some hundred samples of one shard, and the Arrow form in which it crosses Ray Data.

A chunk is one row of a block, so that Ray can neither split nor merge what is in it. Which shard it
is of and which of its samples it holds rides in the row; nothing is derived from order of arrival.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.read.samples import Sample, ShardError
from pipeline.statistics import StageMetrics

if TYPE_CHECKING:
    from torch import Tensor


#: What a reader knows of each sample.
SAMPLE_FIELDS = pa.struct(
    [("key", pa.string()), ("target", pa.int32()), ("error", pa.string()), ("image", pa.large_binary())]
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive samples of one shard.

    Attributes:
        shard: the shard's place in the plan.
        start: index in the shard of the first sample.
        samples: one row a sample; the columns depend on the stage.
        total, error: on the shard's last chunk only: its samples, and why it can't be read any further.
        pixels: uint8 (images, height, width, 3) of the samples that have no error, in their order; a
            tensor where they were decoded on the classifier's device: they stay there.
        transient: whether the cause of the error is the storage, not the shard.
        retries: of storage operations while the chunk was read, by kind of failure.
        metrics: by stage; no result depends on them.
    """

    shard: int
    start: int
    samples: pa.Table
    total: int | None = None
    error: str | None = None
    pixels: np.ndarray | Tensor | None = None
    transient: bool = False
    encoded_bytes: int = 0
    retries: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, StageMetrics] = field(default_factory=dict)

    def to_block(self) -> pa.Table:
        """The chunk as a table of one row; pixels are not copied, and must be an array."""
        rows = self.samples.to_struct_array().combine_chunks()
        others = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("samples", "pixels")}
        columns = {
            "samples": pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows),
            "others": pa.array([pickle.dumps(others)], pa.binary()),
        }
        if self.pixels is not None:
            assert isinstance(self.pixels, np.ndarray)
            columns["shape"] = pa.array([self.pixels.shape], pa.list_(pa.int64()))
            columns["pixels"] = _one_binary(self.pixels)
        return pa.table(columns)

    @staticmethod
    def from_block(block: pa.Table) -> Iterator[Chunk]:
        """The chunks of a block, one a row; a block without rows or columns has none."""
        for row in range(block.num_rows):
            record = block.slice(row, 1)
            samples = record["samples"].combine_chunks().flatten()
            pixels = None
            if "pixels" in record.column_names:
                content = np.frombuffer(record["pixels"][0].as_buffer() or b"", np.uint8)
                pixels = content.reshape(record["shape"][0].as_py())
            others = pickle.loads(record["others"][0].as_py())
            yield Chunk(samples=pa.Table.from_struct_array(samples), pixels=pixels, **others)


def _one_binary(content: np.ndarray) -> pa.Array:
    """A column of one value over the array's own memory."""
    ends = pa.py_buffer(np.array([0, content.nbytes], np.int64))
    data = pa.py_buffer(np.ascontiguousarray(content).reshape(-1))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, data])


def split_into_chunks(
    samples: Iterable[Sample], shard: int, max_images: int, max_bytes: int
) -> Iterator[Chunk]:
    """Cuts a shard's samples into chunks, the last of which says how many samples there were.

    The cut depends on the samples alone, so that a second attempt makes the same chunks. A shard
    that can't be read to its end still ends in a chunk, one that carries the error: an exception
    would end the job, with every other shard's work. A shard always yields at least one chunk.
    A chunk has at most `max_bytes` of encoded images, unless one image alone has more.
    """
    start, size = 0, 0
    waiting: list[Sample] = []
    error, transient = None, False
    try:
        for sample in samples:
            more = len(sample.image or b"")
            if waiting and (len(waiting) == max_images or size + more > max_bytes):
                yield Chunk(shard, start, _table(waiting), encoded_bytes=size)
                start, waiting, size = start + len(waiting), [], 0
            waiting.append(sample)
            size += more
    except ShardError as failure:
        error, transient = str(failure), failure.transient
    total = start + len(waiting)
    table = _table(waiting)
    yield Chunk(shard, start, table, total, error, transient=transient, encoded_bytes=size)


def _table(samples: list[Sample]) -> pa.Table:
    columns = [
        pa.array([getattr(sample, field.name) for sample in samples], field.type) for field in SAMPLE_FIELDS
    ]
    return pa.table(columns, schema=pa.schema(list(SAMPLE_FIELDS)))
