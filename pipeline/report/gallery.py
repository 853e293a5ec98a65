"""The gallery: of each class, thumbnails of the images with the highest and with the lowest confidence.

The driver keeps the best k at each end of what is committed, in `gallery.parquet`.
"""

import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.classify import GALLERY_CLASSES, LEAST, MOST, THUMBNAIL_COLUMN, ranked
from pipeline.read import Chunk, Shard
from pipeline.storage import Storage

GALLERY_FILE = "gallery.parquet"

_SCHEMA = pa.schema(
    [
        ("label_id", pa.int32()),
        ("label", pa.string()),
        ("end", pa.string()),
        ("score", pa.float32()),
        ("shard", pa.string()),
        ("index", pa.int64()),
        ("key", pa.string()),
        ("thumbnail", pa.binary()),
    ]
)

#: Thumbnails in memory of the driver before it drops those that aren't among the best.
_MOST_HELD = 16 * GALLERY_CLASSES


@dataclass(frozen=True, slots=True)
class Item:
    """A row of the gallery's file: a JPEG, with the highest ("most") or lowest ("least") confidence."""

    label_id: int
    label: str
    end: str
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
    """Collects the best thumbnails of committed shards.

    Args:
        count: number of images of each class that are kept at each end.
        shards: shards of the plan, by the number in their chunks.
        most_held: number of thumbnails in memory before those that aren't among the best are dropped.
    """

    def __init__(self, count: int, shards: Sequence[Shard], most_held: int = _MOST_HELD) -> None:
        self._count, self._shards = count, shards
        self._least_held = self._most_held = most_held
        self._arrived: dict[str, list[Item]] = {}
        self._settled: set[str] = set()
        self._items: list[Item] = []

    def take(self, chunk: Chunk) -> Chunk:
        """Takes the thumbnails out of a chunk; returns the chunk without them."""
        if THUMBNAIL_COLUMN not in chunk.samples.column_names:
            return chunk
        shard = self._shards[chunk.shard].uri
        numbers = pa.array(range(chunk.start, chunk.start + chunk.samples.num_rows))
        rows = chunk.samples.append_column("index", numbers)
        rows = rows.select([name for name in _SCHEMA.names if name not in ("end", "shard")])
        items = self._arrived.setdefault(shard, [])
        for row in rows.filter(pc.is_valid(rows[THUMBNAIL_COLUMN])).to_pylist():
            items += [Item(**row, end=end, shard=shard) for end in (MOST, LEAST)]
        return replace(chunk, samples=chunk.samples.drop_columns([THUMBNAIL_COLUMN]))

    def settle(self, shard: str, is_committed: bool) -> None:
        """Keeps the thumbnails of a committed shard, and drops those of another one."""
        items = self._arrived.pop(shard, [])
        if is_committed:
            self._settled.add(shard)
            self._items += items
        if len(self._items) > self._most_held:
            self._items = best_of(self._items, self._count)
            self._most_held = max(self._least_held, 2 * len(self._items))

    def merged(self, before: Iterable[Item], gone: Collection[str], classes: Collection[int]) -> list[Item]:
        """The gallery `before` this run, updated: without the `gone` shards, of these classes only."""
        old = (item for item in before if item.shard not in gone and item.shard not in self._settled)
        shown = [item for item in [*old, *self._items] if item.label_id in classes]
        return best_of(shown, self._count)


def best_of(items: Iterable[Item], count: int) -> list[Item]:
    """The `count` images of each class with the highest, and with the lowest confidence, by class id.

    No image is at both ends; a class with few images has them at the end of the highest confidence.
    """
    groups: dict[tuple[int, str], dict[tuple[str, int], Item]] = {}
    for item in items:
        groups.setdefault((item.label_id, item.end), {})[item.sample] = item
    found = []
    for label_id in sorted({label_id for label_id, _ in groups}):
        taken: set[tuple[str, int]] = set()
        for end in (MOST, LEAST):
            group = groups.get((label_id, end), {})
            order = sorted(group.values(), key=lambda item: (ranked(item.end, -item.score), item.sample))
            best = [item for item in order if item.sample not in taken][:count]
            taken.update(item.sample for item in best)
            found += best
    return found


def read_gallery(storage: Storage, partition: str) -> list[Item]:
    """Reads the gallery of a partition; empty where there is none."""
    found = storage.read_latest(
        f"{partition}/{GALLERY_FILE}", lambda file: pq.read_table(file, schema=_SCHEMA)
    )
    return [] if found is None else [Item(**row) for row in found.content.to_pylist()]


def write_gallery(storage: Storage, partition: str, items: Sequence[Item]) -> None:
    """Writes the gallery of a partition."""
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(item) for item in items], _SCHEMA), out, compression="zstd")
    storage.write(f"{partition}/{GALLERY_FILE}", out.getvalue())
