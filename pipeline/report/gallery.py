"""The gallery: per class, thumbnails of the images with the highest and with the lowest confidence.

The driver keeps the best k thumbnails of each selection for committed shards, in `gallery.parquet`.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.classify import GALLERY_CLASSES, HIGHEST_CONFIDENCE, LOWEST_CONFIDENCE, THUMBNAIL_COLUMN
from pipeline.read import Chunk, Shard
from pipeline.storage import Storage, content_errors, encode_parquet, read_table

GALLERY_FILE = "gallery.parquet"

#: `selection` is `highest_confidence` or `lowest_confidence`, and `thumbnail` is a JPEG.
GALLERY_SCHEMA = pa.schema(
    [
        ("label_id", pa.int32()),
        ("label", pa.string()),
        ("selection", pa.string()),
        ("score", pa.float32()),
        ("shard", pa.string()),
        ("index", pa.int64()),
        ("key", pa.string()),
        ("thumbnail", pa.binary()),
    ]
)

#: The rows in memory. Arrow cannot reorder more than 2 GiB of the type `binary`.
MEMORY_SCHEMA = GALLERY_SCHEMA.set(7, pa.field("thumbnail", pa.large_binary()))
_NO_ROWS = MEMORY_SCHEMA.empty_table()
_BATCH_ROWS = 10_000
#: New thumbnails in memory before the driver drops those that are not among the best.
_MAX_NEW_ROWS = 8 * GALLERY_CLASSES


class Gallery:
    """Collects the best thumbnails of committed shards: `count` per class and selection.

    Drops the other thumbnails when there are many new ones: `max_new_rows`, and as many as were kept.
    """

    def __init__(self, count: int, shards: Sequence[Shard], max_new_rows: int = _MAX_NEW_ROWS) -> None:
        self._count, self._shards = count, shards
        self._max_rows = self._max_new_rows = max_new_rows
        # By shard and by the chunk's start: the rows of a retried chunk replace the earlier rows.
        self._uncommitted: defaultdict[str, dict[int, pa.Table]] = defaultdict(dict)
        self._committed_shards: set[str] = set()
        self._rows = _NO_ROWS

    def collect(self, chunk: Chunk, positions: Sequence[int] | None = None) -> Chunk:
        """Moves the thumbnails of a chunk into the gallery; returns the chunk without thumbnails.

        `positions` has the index in the shard of each image that is read; None if all images are read.
        """
        if THUMBNAIL_COLUMN not in chunk.samples.column_names:
            return chunk
        shard, count = self._shards[chunk.shard].uri, chunk.samples.num_rows
        rows = chunk.samples.append_column("shard", pa.repeat(shard, count))
        numbers = range(chunk.start, chunk.start + count)
        indices = numbers if positions is None else [positions[number] for number in numbers]
        rows = rows.append_column("index", pa.array(indices, pa.int64()))
        rows = rows.append_column("selection", pa.nulls(count))
        rows = rows.filter(pc.is_valid(rows[THUMBNAIL_COLUMN]))
        if len(rows):
            self._uncommitted[shard][chunk.start] = rows.select(MEMORY_SCHEMA.names).cast(MEMORY_SCHEMA)
        return replace(chunk, samples=chunk.samples.drop_columns([THUMBNAIL_COLUMN]))

    def finish_shard(self, shard: str, is_committed: bool) -> None:
        """Keeps the thumbnails of a shard if the shard is committed; drops them otherwise."""
        chunks = self._uncommitted.pop(shard, {})
        if is_committed:
            self._committed_shards.add(shard)
            self._rows = pa.concat_tables([self._rows, *chunks.values()])
        if len(self._rows) > self._max_rows:
            self._rows = select_best(self._rows, self._count)
            self._max_rows = len(self._rows) + max(self._max_new_rows, len(self._rows))

    def merge(
        self,
        previous: pa.Table,
        removed_shards: Collection[str],
        classes: Collection[int],
        copied: pa.Table = _NO_ROWS,
    ) -> pa.Table:
        """Merges the rows of this run into the previous gallery; drops removed shards and other classes.

        `copied` has rows of the previous gallery whose image moved: with their new shard and index.
        """
        committed = pa.array(self._committed_shards, pa.string())
        dropped = pa.array(self._committed_shards.union(removed_shards), pa.string())
        kept = previous.filter(pc.invert(pc.is_in(previous["shard"], value_set=dropped)))
        moved = copied.filter(pc.is_in(copied["shard"], value_set=committed))
        rows = pa.concat_tables([kept, self._rows, moved])
        in_classes = pc.is_in(rows["label_id"], value_set=pa.array(classes, pa.int32()))
        return select_best(rows.filter(in_classes), self._count)


def select_best(rows: pa.Table, count: int) -> pa.Table:
    """Returns the `count` images per class with the highest, and with the lowest confidence, by class id.

    No image is in both selections. The images of a class with few images are in the first selection.
    """
    by_sample = [("shard", "ascending"), ("index", "ascending")]
    rows = rows.sort_by([("label_id", "ascending"), ("score", "descending"), *by_sample])
    label_id, position = rows["label_id"].to_numpy(), np.arange(len(rows))
    rank = position - np.searchsorted(label_id, label_id)
    rank_from_end = np.searchsorted(label_id, label_id, "right") - 1 - position
    is_highest = rank < count
    selection = np.where(is_highest, HIGHEST_CONFIDENCE, LOWEST_CONFIDENCE)
    rows = rows.set_column(2, MEMORY_SCHEMA.field("selection"), pa.array(selection))
    best_first = np.lexsort((np.where(is_highest, rank, rank_from_end), ~is_highest, label_id))
    return rows.take(best_first[(is_highest | (rank_from_end < count))[best_first]])


def read_gallery(storage: Storage, partition: str) -> pa.Table:
    """Reads the gallery of a partition; returns an empty table if the partition has none."""
    uri = f"{partition}/{GALLERY_FILE}"
    with content_errors(uri, "a gallery"):
        stored = storage.read_latest(uri, read_table)
        rows = GALLERY_SCHEMA.empty_table() if stored is None else stored.content
        return rows.select(MEMORY_SCHEMA.names).cast(MEMORY_SCHEMA)


def encode_gallery(rows: pa.Table) -> bytes:
    """Returns the content of a gallery."""
    batches = [batch.cast(GALLERY_SCHEMA) for batch in rows.to_batches(_BATCH_ROWS)]
    return encode_parquet(pa.Table.from_batches(batches, GALLERY_SCHEMA))
