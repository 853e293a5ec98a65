"""The gallery: per class, thumbnails of the images with the highest and with the lowest confidence.

The driver keeps the best k thumbnails of each selection for committed shards, in `gallery.parquet`.
"""

import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.classify import (
    GALLERY_CLASSES,
    HIGHEST_CONFIDENCE,
    LOWEST_CONFIDENCE,
    THUMBNAIL_COLUMN,
    rank_scores,
)
from pipeline.read import Chunk, Shard
from pipeline.storage import Storage, content_errors, read_table

GALLERY_FILE = "gallery.parquet"

_SCHEMA = pa.schema(
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

#: Thumbnails in memory before the driver drops those that are not among the best.
_MAX_ITEMS = 16 * GALLERY_CLASSES


@dataclass(frozen=True, slots=True)
class GalleryItem:
    """A row of `gallery.parquet`.

    Attributes:
        selection: `highest_confidence` or `lowest_confidence`.
        thumbnail: a JPEG.
    """

    label_id: int
    label: str
    selection: str
    score: float
    shard: str
    index: int
    key: str
    thumbnail: bytes

    @property
    def sample(self) -> tuple[str, int]:
        """Shard and index."""
        return self.shard, self.index


class Gallery:
    """Collects the best thumbnails of committed shards: `count` per class and selection.

    Drops the other thumbnails when more than `max_items` are in memory.
    """

    def __init__(self, count: int, shards: Sequence[Shard], max_items: int = _MAX_ITEMS) -> None:
        self._count, self._shards = count, shards
        self._initial_max_items = self._max_items = max_items
        self._uncommitted: dict[str, list[GalleryItem]] = {}
        self._committed_shards: set[str] = set()
        self._items: list[GalleryItem] = []

    def collect(self, chunk: Chunk) -> Chunk:
        """Moves the thumbnails of a chunk into the gallery; returns the chunk without thumbnails."""
        if THUMBNAIL_COLUMN not in chunk.samples.column_names:
            return chunk
        shard = self._shards[chunk.shard].uri
        indexes = pa.array(range(chunk.start, chunk.start + chunk.samples.num_rows))
        rows = chunk.samples.append_column("index", indexes)
        rows = rows.select([name for name in _SCHEMA.names if name not in ("selection", "shard")])
        items = self._uncommitted.setdefault(shard, [])
        for row in rows.filter(pc.is_valid(rows[THUMBNAIL_COLUMN])).to_pylist():
            items += [
                GalleryItem(**row, selection=selection, shard=shard)
                for selection in (HIGHEST_CONFIDENCE, LOWEST_CONFIDENCE)
            ]
        return replace(chunk, samples=chunk.samples.drop_columns([THUMBNAIL_COLUMN]))

    def finish_shard(self, shard: str, is_committed: bool) -> None:
        """Keeps the thumbnails of a shard if the shard is committed; drops them otherwise."""
        items = self._uncommitted.pop(shard, [])
        if is_committed:
            self._committed_shards.add(shard)
            self._items += items
        if len(self._items) > self._max_items:
            self._items = select_best(self._items, self._count)
            self._max_items = max(self._initial_max_items, 2 * len(self._items))

    def merge(
        self, previous: Iterable[GalleryItem], removed_shards: Collection[str], classes: Collection[int]
    ) -> list[GalleryItem]:
        """Merges the items of this run into the previous gallery; drops removed shards and other classes."""
        dropped = self._committed_shards.union(removed_shards)
        kept = (item for item in previous if item.shard not in dropped)
        return select_best((item for item in [*kept, *self._items] if item.label_id in classes), self._count)


def select_best(items: Iterable[GalleryItem], count: int) -> list[GalleryItem]:
    """Returns the `count` images per class with the highest, and with the lowest confidence, by class id.

    No image is in both selections. The images of a class with few images are in the first selection.
    """
    groups: dict[tuple[int, str], dict[tuple[str, int], GalleryItem]] = {}
    for item in items:
        groups.setdefault((item.label_id, item.selection), {})[item.sample] = item
    selected = []
    for label_id in sorted({label_id for label_id, _ in groups}):
        selected_samples: set[tuple[str, int]] = set()
        for selection in (HIGHEST_CONFIDENCE, LOWEST_CONFIDENCE):
            group = groups.get((label_id, selection), {})
            ranking = sorted(
                group.values(), key=lambda item: (rank_scores(item.selection, -item.score), item.sample)
            )
            best = [item for item in ranking if item.sample not in selected_samples][:count]
            selected_samples.update(item.sample for item in best)
            selected += best
    return selected


def read_gallery(storage: Storage, partition: str) -> list[GalleryItem]:
    """Reads the gallery of a partition; returns an empty list if the partition has none."""
    uri = f"{partition}/{GALLERY_FILE}"
    with content_errors(uri, "a gallery"):
        stored = storage.read_latest(uri, lambda file: read_table(file).select(_SCHEMA.names).cast(_SCHEMA))
    return [] if stored is None else [GalleryItem(**row) for row in stored.content.to_pylist()]


def write_gallery(storage: Storage, partition: str, items: Sequence[GalleryItem]) -> None:
    """Writes the gallery of a partition."""
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(item) for item in items], _SCHEMA), out, compression="zstd")
    storage.write(f"{partition}/{GALLERY_FILE}", out.getvalue())
