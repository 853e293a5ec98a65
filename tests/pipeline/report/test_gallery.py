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
from pipeline.report import Gallery, encode_gallery, read_gallery
from pipeline.report.gallery import MEMORY_SCHEMA, select_best
from pipeline.storage import Storage, StorageError

NO_ROWS = MEMORY_SCHEMA.empty_table()
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
    shown = Gallery(1, SHARDS).merge(gallery(*(item(0.5, label=n) for n in (7, 3, 5))), set(), {7, 5})
    assert shown["label_id"].to_pylist() == [5, 7]


def test_thumbnail_is_at_most_as_large_as_requested_and_as_the_image() -> None:
    chunk = make_classified([0.5], [0])
    for side, wanted in ((16, 16), (64, 40)):
        data = Thumbnails(1, side).add_column(add_pixels(chunk), chunk).samples["thumbnail"][0].as_py()
        assert Image.open(io.BytesIO(data)).size == (wanted, wanted)


Item = tuple[int, str, str, float, str, int, str, bytes]


def item(score: float, label: int = 0, shard: str = "/in/a.tar") -> Item:
    return label, "a class", HIGHEST_CONFIDENCE, score, shard, int(score * 100), "key", b"x"


def gallery(*items: Item) -> pa.Table:
    return pa.table([*zip(*items, strict=True)], names=MEMORY_SCHEMA.names).cast(MEMORY_SCHEMA)


def scores(rows: pa.Table) -> list[float]:
    return [round(score, 3) for score in rows["score"].to_pylist()]


def test_each_image_is_in_one_selection_only() -> None:
    rows = gallery(*(item(score, label) for score in (0.1, 0.2, 0.3, 0.4, 0.5) for label in (3, 4)))
    for count, highest, lowest in ((2, [0.5, 0.4], [0.1, 0.2]), (4, [0.5, 0.4, 0.3, 0.2], [0.1])):
        best = select_best(rows, count)
        assert scores(best) == 2 * (highest + lowest)
        selection = [HIGHEST_CONFIDENCE] * len(highest) + [LOWEST_CONFIDENCE] * len(lowest)
        assert best["selection"].to_pylist() == 2 * selection


def test_image_displaced_from_the_first_selection_can_be_in_the_second() -> None:
    best = select_best(gallery(item(0.5), item(0.6)), 2)
    best = select_best(pa.concat_tables([best, gallery(item(0.7))]), 2)
    assert scores(best) == [0.7, 0.6, 0.5]
    assert best["selection"].to_pylist() == [*[HIGHEST_CONFIDENCE] * 2, LOWEST_CONFIDENCE]


def collect(kept: Gallery, chunk: Chunk) -> Chunk:
    return kept.collect(Thumbnails(2, 16).add_column(add_pixels(chunk), chunk))


def test_gallery_has_committed_shards_only() -> None:
    kept = Gallery(2, SHARDS)
    chunk = make_classified([0.5, None, 0.9], [0, 0, 1], start=10)
    assert collect(kept, chunk).samples.equals(chunk.samples)
    collect(kept, make_classified([0.99], [0], shard=1))
    kept.finish_shard("/in/a.tar", is_committed=True)
    kept.finish_shard("/in/b.tar", is_committed=False)
    found = kept.merge(NO_ROWS, set(), {0, 1})
    assert found["shard"].to_pylist() == ["/in/a.tar"] * 2
    assert found["index"].to_pylist() == [10, 12]
    assert found["key"].to_pylist() == ["key 10", "key 12"]


def test_thumbnails_of_a_retry_are_kept_once() -> None:
    kept = Gallery(2, SHARDS)
    for _ in range(2):
        collect(kept, make_classified([0.5], [0]))
    kept.finish_shard("/in/a.tar", is_committed=True)
    assert len(kept.merge(NO_ROWS, set(), {0, 1})) == 1


def test_thumbnails_of_removed_or_relabeled_shards_are_dropped() -> None:
    kept = Gallery(2, SHARDS)
    collect(kept, make_classified([0.5], [0]))
    kept.finish_shard("/in/a.tar", is_committed=True)
    before = gallery(item(0.9), item(0.8, shard="/in/old.tar"), item(0.7, shard="/in/removed.tar"))
    found = kept.merge(before, {"/in/removed.tar"}, {0})
    assert found["shard"].to_pylist() == ["/in/old.tar", "/in/a.tar"]
    assert scores(found) == [0.8, 0.5]


def test_number_of_thumbnails_in_memory_is_limited() -> None:
    kept = Gallery(1, SHARDS, max_new_rows=10)
    for number in range(50):
        collect(kept, make_classified([0.3 + number / 100], [0], start=number))
        kept.finish_shard("/in/a.tar", is_committed=True)
        assert len(kept._rows) <= 10 + 2
    assert scores(kept.merge(NO_ROWS, set(), {0, 1})) == [0.79, 0.3]


def test_written_gallery_reads_back_equal(tmp_path: Path) -> None:
    storage, rows = Storage(), gallery(item(0.5), item(0.25))
    assert read_gallery(storage, str(tmp_path)).equals(NO_ROWS)
    storage.write(f"{tmp_path}/gallery.parquet", encode_gallery(rows))
    assert read_gallery(storage, str(tmp_path)).equals(rows)
    storage.write(f"{tmp_path}/gallery.parquet", b"something else")
    with pytest.raises(StorageError, match="not a gallery"):
        read_gallery(storage, str(tmp_path))
