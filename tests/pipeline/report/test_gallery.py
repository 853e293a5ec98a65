"""The gallery: which thumbnails are made, kept and dropped."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipeline.classify import Thumbnails
from pipeline.read import Chunk, Shard
from pipeline.report import Gallery, Item, read_gallery, write_gallery
from pipeline.report.gallery import best_of
from pipeline.storage import Storage

SHARDS = [Shard(uri=f"/in/{name}.tar", version="1", format="webdataset", size=1) for name in "ab"]


def classified(scores: list[float | None], labels: list[int], shard: int = 0, start: int = 0) -> Chunk:
    """A chunk whose samples have these scores; None is a sample that could not be decoded."""
    samples = pa.table(
        {
            "key": [f"key {start + row}" for row in range(len(scores))],
            "error": pa.array(["broken" if score is None else None for score in scores], pa.string()),
            "label_id": pa.array(
                [None if s is None else label for s, label in zip(scores, labels, strict=True)], pa.int32()
            ),
            "label": pa.array([None if s is None else "a class" for s in scores], pa.string()),
            "score": pa.array(scores, pa.float32()),
        }
    )
    return Chunk(shard, start, samples)


def with_pixels(chunk: Chunk) -> Chunk:
    """The chunk before it was classified: the pixels of a sample are all 10 times its row."""
    good = [row for row, error in enumerate(chunk.samples["error"].to_pylist()) if error is None]
    pixels = np.stack([np.full((40, 40, 3), 10 * row % 256, np.uint8) for row in good])
    return replace(chunk, pixels=pixels)


def shades(chunk: Chunk) -> dict[int, int]:
    """Rows that have a thumbnail, and how bright it is."""
    thumbnails = chunk.samples["thumbnail"].to_pylist()
    return {
        row: round(float(np.asarray(Image.open(io.BytesIO(data))).mean()))
        for row, data in enumerate(thumbnails)
        if data is not None
    }


def test_highest_and_lowest_confidence_of_a_class_get_thumbnails() -> None:
    chunk = classified([0.5, None, 0.9, 0.7, 0.6, 0.8], [0, 0, 0, 0, 0, 1])
    made = Thumbnails(1, 16).added(with_pixels(chunk), chunk)
    # When it came, 0.5 had the highest score, too; 0.7 and 0.6 had neither.
    assert shades(made) == {0: 0, 2: 20, 5: 50}
    assert made.samples.drop_columns(["thumbnail"]).equals(chunk.samples)


def test_tensor_gives_the_same_thumbnails_as_an_array() -> None:
    chunk = classified([0.5, None, 0.9], [0, 0, 0])
    decoded = with_pixels(chunk)
    on_device = replace(decoded, pixels=torch.tensor(decoded.pixels))
    assert shades(Thumbnails(1, 16).added(on_device, chunk)) == {0: 0, 2: 20}


def test_sample_without_a_label_does_not_shift_the_others() -> None:
    decoded = with_pixels(classified([0.5, 0.6, 0.9], [0, 0, 0]))
    failed = classified([0.5, None, 0.9], [0, 0, 0])
    assert shades(Thumbnails(2, 16).added(decoded, failed)) == {0: 0, 2: 20}


def test_fewer_thumbnails_are_made_the_longer_a_run_takes() -> None:
    chance, thumbnails, made = np.random.default_rng(0), Thumbnails(3, 16), []
    for _ in range(20):
        chunk = classified(chance.random(500).tolist(), chance.integers(0, 10, 500).tolist())
        made.append(len(shades(thumbnails.added(with_pixels(chunk), chunk))))
    assert made[0] > 100
    # k * ln(n / k) at each end of ten classes; on average, so with room.
    assert sum(made) < 1.5 * 2 * 10 * 3 * (1 + np.log(1000 / 3))
    assert sum(made[10:]) < made[0] / 2


def test_number_of_classes_is_limited() -> None:
    chunk = classified([0.5, 0.6, 0.7], [7, 3, 5])
    assert set(shades(Thumbnails(1, 16, most_classes=2).added(with_pixels(chunk), chunk))) == {0, 1}
    shown = Gallery(1, SHARDS).merged([item(0.5, label=n) for n in (7, 3, 5)], set(), {7, 5})
    assert [one.label_id for one in shown] == [5, 7]


def test_thumbnail_is_not_larger_than_asked_for_or_than_the_image() -> None:
    chunk = classified([0.5], [0])
    for side, wanted in ((16, 16), (64, 40)):
        data = Thumbnails(1, side).added(with_pixels(chunk), chunk).samples["thumbnail"][0].as_py()
        assert Image.open(io.BytesIO(data)).size == (wanted, wanted)


def item(
    score: float, end: str = "most", label: int = 0, shard: str = "/in/a.tar", index: int | None = None
) -> Item:
    return Item(
        label, "a class", end, score, shard, int(score * 100) if index is None else index, "key", b"x"
    )


def test_best_images_are_kept_at_one_end_each() -> None:
    both = [item(score, end) for score in (0.1, 0.2, 0.3, 0.4, 0.5) for end in ("most", "least")]
    kept = [(one.end, one.score) for one in best_of(both, 2)]
    assert kept == [("most", 0.5), ("most", 0.4), ("least", 0.1), ("least", 0.2)]
    kept = [(one.end, one.score) for one in best_of(both, 4)]
    assert kept == [("most", 0.5), ("most", 0.4), ("most", 0.3), ("most", 0.2), ("least", 0.1)]


def arrive(kept: Gallery, chunk: Chunk) -> Chunk:
    return kept.take(Thumbnails(2, 16).added(with_pixels(chunk), chunk))


def test_gallery_shows_committed_shards_only() -> None:
    kept = Gallery(2, SHARDS)
    chunk = classified([0.5, None, 0.9], [0, 0, 1], start=10)
    assert arrive(kept, chunk).samples.equals(chunk.samples)
    arrive(kept, classified([0.99], [0], shard=1))
    kept.settle("/in/a.tar", is_committed=True)
    kept.settle("/in/b.tar", is_committed=False)
    found = kept.merged([], set(), {0, 1})
    assert [(one.shard, one.index, one.key) for one in found] == [
        ("/in/a.tar", 10, "key 10"),
        ("/in/a.tar", 12, "key 12"),
    ]


def test_thumbnails_of_a_retry_are_kept_once() -> None:
    kept = Gallery(2, SHARDS)
    for _ in range(2):
        arrive(kept, classified([0.5], [0]))
    kept.settle("/in/a.tar", is_committed=True)
    assert len(kept.merged([], set(), {0, 1})) == 1


def test_earlier_thumbnails_stay_unless_their_shard_is_removed_or_relabeled() -> None:
    kept = Gallery(2, SHARDS)
    arrive(kept, classified([0.5], [0]))
    kept.settle("/in/a.tar", is_committed=True)
    before = [item(0.9), item(0.8, shard="/in/old.tar"), item(0.7, shard="/in/removed.tar")]
    found = kept.merged(before, {"/in/removed.tar"}, {0})
    assert [(one.shard, round(one.score, 3)) for one in found] == [("/in/old.tar", 0.8), ("/in/a.tar", 0.5)]


def test_number_of_thumbnails_in_memory_is_limited() -> None:
    kept = Gallery(1, SHARDS, most_held=10)
    for number in range(50):
        arrive(kept, classified([0.3 + number / 100], [0], start=number))
        kept.settle("/in/a.tar", is_committed=True)
    assert len(kept._items) <= 10 + 2
    assert [round(one.score, 2) for one in kept.merged([], set(), {0, 1})] == [0.79, 0.3]


def test_gallery_is_read_as_it_was_written(tmp_path: Path) -> None:
    storage, items = Storage(), [item(0.5), item(0.25, "least")]
    assert read_gallery(storage, str(tmp_path)) == []
    write_gallery(storage, str(tmp_path), items)
    assert read_gallery(storage, str(tmp_path)) == items
