"""The gallery: of each class, small pictures of the images that the model is surest of, and least sure of.

Classifiers make the thumbnails, since only they have both pixels and scores, of those images alone that
beat what they have seen: with n images of a class, about k * ln(n / k) for each end. The driver keeps the
best k of what is committed, in `gallery.parquet`. No label depends on any of it.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.classify import ENDS, SCHEMA
from pipeline.classify.thumbnails import COLUMN, MOST_HELD, ranked
from pipeline.read import Chunk, Shard
from pipeline.storage import ObjectNotFound, Storage

FILE_NAME = "gallery.parquet"


@dataclass(frozen=True, slots=True)
class Item:
    """One image of the gallery, as the row of its file.

    Attributes:
        label_id, label, score: as predicted.
        end: "most" or "least", by confidence.
        shard, index, key: which sample it is.
        thumbnail: a JPEG.
    """

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
    """Gathers, in the driver, what is to be shown of the shards that are committed.

    Args:
        count: images of each class that are kept at each end.
        shards: of the plan, by the number that their chunks carry.
    """

    def __init__(self, count: int, shards: Sequence[Shard]) -> None:
        self._count = count
        self._shards = shards
        self._arrived: dict[str, list[Item]] = {}
        self._most_held = MOST_HELD
        self._settled: set[str] = set()
        self._items: list[Item] = []

    def take(self, chunk: Chunk) -> Chunk:
        """Takes a chunk's thumbnails out of it, until its shard is committed or not."""
        if COLUMN not in chunk.samples.column_names:
            return chunk
        shard = self._shards[chunk.shard].uri
        numbered = chunk.samples.append_column("row", pa.array(range(chunk.samples.num_rows)))
        items = self._arrived.setdefault(shard, [])
        for row in numbered.filter(pc.is_valid(numbered[COLUMN])).to_pylist():
            at = chunk.start + row["row"]
            for end in ENDS:
                about = (row["label_id"], row["label"], end, row["score"], shard, at, row["key"])
                items.append(Item(*about, thumbnail=row[COLUMN]))
        return replace(chunk, samples=chunk.samples.drop_columns([COLUMN]))

    def settle(self, shard: str, is_committed: bool) -> None:
        """Keeps the thumbnails of a shard whose labels are there now, or forgets them."""
        items = self._arrived.pop(shard, [])
        if is_committed:
            self._settled.add(shard)
            self._items += items
        if len(self._items) > self._most_held:
            self._items = best_of(self._items, self._count)
            self._most_held = max(MOST_HELD, 2 * len(self._items))

    def merged(self, before: Iterable[Item], gone: Collection[str], classes: Collection[int]) -> list[Item]:
        """What the gallery is now.

        Args:
            before: what it was.
            gone: shards whose labels were removed since.
            classes: that it is to show.
        """
        old = (item for item in before if item.shard not in gone and item.shard not in self._settled)
        shown = [item for item in [*old, *self._items] if item.label_id in classes]
        return best_of(shown, self._count)


def best_of(items: Iterable[Item], count: int) -> list[Item]:
    """Of each class the surest and the least sure images, so many of each, in the order of their classes.

    The same image is not both; a class with few images has them among its surest.
    """
    groups: dict[tuple[int, str], dict[tuple[str, int], Item]] = {}
    for item in items:
        groups.setdefault((item.label_id, item.end), {})[item.sample] = item
    found = []
    for label_id in sorted({label_id for label_id, _ in groups}):
        taken: set[tuple[str, int]] = set()
        for end in ENDS:
            group = groups.get((label_id, end), {})
            order = sorted(group.values(), key=lambda item: (ranked(item.end, -item.score), item.sample))
            best = [item for item in order if item.sample not in taken][:count]
            taken.update(item.sample for item in best)
            found += best
    return found


def read_gallery(storage: Storage, partition: str) -> list[Item]:
    """The gallery of a partition; empty where there is none.

    Raises:
        StorageError: it can't be read.
    """
    uri = f"{partition}/{FILE_NAME}"
    try:
        with storage.open(uri, storage.stat(uri).version) as file:
            return [Item(**row) for row in pq.read_table(file, schema=SCHEMA).to_pylist()]
    except ObjectNotFound:
        return []


def write_gallery(storage: Storage, partition: str, items: Sequence[Item]) -> None:
    """Writes it.

    Raises:
        StorageError: it can't be written.
    """
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(item) for item in items], SCHEMA), out, compression="zstd")
    storage.write(f"{partition}/{FILE_NAME}", out.getvalue())
