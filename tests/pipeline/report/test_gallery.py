"""The gallery: which thumbnails are created, kept and dropped."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.classify import HIGHEST_CONFIDENCE, LOWEST_CONFIDENCE, Thumbnails
from pipeline.read import Chunk, Shard
from pipeline.report import Gallery, GalleryItem, read_gallery, write_gallery
from pipeline.report.gallery import select_best
from pipeline.storage import Storage, StorageError

SHARDS = [Shard(uri=f"/in/{name}.tar", version="1", format="webdataset", size=1) for name in "ab"]


def make_classified(scores: list[float | None], labels: list[int], shard: int = 0, start: int = 0) -> Chunk:
    """Makes a classified chunk with these scores; None is a sample that could not be decoded."""
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


def add_pixels(chunk: Chunk) -> Chunk:
    """Makes the chunk before classification: all pixels of a sample are 10 times its row."""
    good = [row for row, error in enumerate(chunk.samples["error"].to_pylist()) if error is None]
    pixels = np.stack([np.full((40, 40, 3), 10 * row % 256, np.uint8) for row in good])
    return replace(chunk, pixels=pixels)


def brightness_by_row(chunk: Chunk) -> dict[int, int]:
    """Returns the brightness of each thumbnail by row."""
    thumbnails = chunk.samples["thumbnail"].to_pylist()
    return {
        row: round(float(np.asarray(Image.open(io.BytesIO(data))).mean()))
        for row, data in enumerate(thumbnails)
        if data is not None
    }


def test_highest_and_lowest_confidence_of_a_class_get_thumbnails() -> None:
    chunk = make_classified([0.5, None, 0.9, 0.7, 0.6, 0.8], [0, 0, 0, 0, 0, 1])
    made = Thumbnails(1, 16).add_column(add_pixels(chunk), chunk)
    # When 0.5 was the first score, it was the highest and the lowest. 0.7 and 0.6 were neither.
    assert brightness_by_row(made) == {0: 0, 2: 20, 5: 50}
    assert made.samples.drop_columns(["thumbnail"]).equals(chunk.samples)


def test_tensor_has_the_same_thumbnails_as_an_array() -> None:
    chunk = make_classified([0.5, None, 0.9], [0, 0, 0])
    decoded = add_pixels(chunk)
    on_device = replace(decoded, pixels=torch.tensor(decoded.pixels))
    assert brightness_by_row(Thumbnails(1, 16).add_column(on_device, chunk)) == {0: 0, 2: 20}


def test_failed_sample_does_not_shift_other_thumbnails() -> None:
    decoded = add_pixels(make_classified([0.5, 0.6, 0.9], [0, 0, 0]))
    failed = make_classified([0.5, None, 0.9], [0, 0, 0])
    assert brightness_by_row(Thumbnails(2, 16).add_column(decoded, failed)) == {0: 0, 2: 20}


def test_rate_of_new_thumbnails_falls_during_a_run() -> None:
    rng, thumbnails, made = np.random.default_rng(0), Thumbnails(3, 16), []
    for _ in range(20):
        chunk = make_classified(rng.random(500).tolist(), rng.integers(0, 10, 500).tolist())
        made.append(len(brightness_by_row(thumbnails.add_column(add_pixels(chunk), chunk))))
    assert made[0] > 100
    # The expected number is k * ln(n / k) per selection of ten classes. The factor 1.5 is a margin.
    assert sum(made) < 1.5 * 2 * 10 * 3 * (1 + np.log(1000 / 3))
    assert sum(made[10:]) < made[0] / 2


def test_number_of_gallery_classes_is_limited() -> None:
    chunk = make_classified([0.5, 0.6, 0.7], [7, 3, 5])
    assert set(brightness_by_row(Thumbnails(1, 16, max_classes=2).add_column(add_pixels(chunk), chunk))) == {
        0,
        1,
    }
    shown = Gallery(1, SHARDS).merge([item(0.5, label=n) for n in (7, 3, 5)], set(), {7, 5})
    assert [one.label_id for one in shown] == [5, 7]


def test_thumbnail_is_at_most_as_large_as_requested_and_as_the_image() -> None:
    chunk = make_classified([0.5], [0])
    for side, wanted in ((16, 16), (64, 40)):
        data = Thumbnails(1, side).add_column(add_pixels(chunk), chunk).samples["thumbnail"][0].as_py()
        assert Image.open(io.BytesIO(data)).size == (wanted, wanted)


def item(
    score: float,
    selection: str = HIGHEST_CONFIDENCE,
    label: int = 0,
    shard: str = "/in/a.tar",
    index: int | None = None,
) -> GalleryItem:
    return GalleryItem(
        label, "a class", selection, score, shard, int(score * 100) if index is None else index, "key", b"x"
    )


def test_each_image_is_in_one_selection_only() -> None:
    both = [
        item(score, selection)
        for score in (0.1, 0.2, 0.3, 0.4, 0.5)
        for selection in (HIGHEST_CONFIDENCE, LOWEST_CONFIDENCE)
    ]
    for count, highest, lowest in ((2, [0.5, 0.4], [0.1, 0.2]), (4, [0.5, 0.4, 0.3, 0.2], [0.1])):
        assert [(one.selection, one.score) for one in select_best(both, count)] == [
            *((HIGHEST_CONFIDENCE, score) for score in highest),
            *((LOWEST_CONFIDENCE, score) for score in lowest),
        ]


def collect(gallery: Gallery, chunk: Chunk) -> Chunk:
    return gallery.collect(Thumbnails(2, 16).add_column(add_pixels(chunk), chunk))


def test_gallery_has_committed_shards_only() -> None:
    gallery = Gallery(2, SHARDS)
    chunk = make_classified([0.5, None, 0.9], [0, 0, 1], start=10)
    assert collect(gallery, chunk).samples.equals(chunk.samples)
    collect(gallery, make_classified([0.99], [0], shard=1))
    gallery.finish_shard("/in/a.tar", is_committed=True)
    gallery.finish_shard("/in/b.tar", is_committed=False)
    found = gallery.merge([], set(), {0, 1})
    assert [(one.shard, one.index, one.key) for one in found] == [
        ("/in/a.tar", 10, "key 10"),
        ("/in/a.tar", 12, "key 12"),
    ]


def test_thumbnails_of_a_retry_are_kept_once() -> None:
    gallery = Gallery(2, SHARDS)
    for _ in range(2):
        collect(gallery, make_classified([0.5], [0]))
    gallery.finish_shard("/in/a.tar", is_committed=True)
    assert len(gallery.merge([], set(), {0, 1})) == 1


def test_thumbnails_of_removed_or_relabeled_shards_are_dropped() -> None:
    gallery = Gallery(2, SHARDS)
    collect(gallery, make_classified([0.5], [0]))
    gallery.finish_shard("/in/a.tar", is_committed=True)
    before = [item(0.9), item(0.8, shard="/in/old.tar"), item(0.7, shard="/in/removed.tar")]
    found = gallery.merge(before, {"/in/removed.tar"}, {0})
    assert [(one.shard, round(one.score, 3)) for one in found] == [("/in/old.tar", 0.8), ("/in/a.tar", 0.5)]


def test_number_of_thumbnails_in_memory_is_limited() -> None:
    gallery = Gallery(1, SHARDS, max_items=10)
    for number in range(50):
        collect(gallery, make_classified([0.3 + number / 100], [0], start=number))
        gallery.finish_shard("/in/a.tar", is_committed=True)
    assert len(gallery._items) <= 10 + 2
    assert [round(one.score, 2) for one in gallery.merge([], set(), {0, 1})] == [0.79, 0.3]


def test_written_gallery_reads_back_equal(tmp_path: Path) -> None:
    storage, items = Storage(), [item(0.5), item(0.25, LOWEST_CONFIDENCE)]
    assert read_gallery(storage, str(tmp_path)) == []
    write_gallery(storage, str(tmp_path), items)
    assert read_gallery(storage, str(tmp_path)) == items
    storage.write(f"{tmp_path}/gallery.parquet", b"something else")
    with pytest.raises(StorageError, match="not a gallery"):
        read_gallery(storage, str(tmp_path))
