"""Tests of the command `stats`."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.stats import stats
from pipeline.storage import Storage
from tests.command import invoke
from tests.partitions import make_predictions, write_partition

LABELS = ["coat", "bag", "hat"]


@pytest.mark.parametrize(
    ("predicted", "options", "title"),
    [
        ([0, 0, 1], [], "Classes of all 3 labeled images"),
        ([0, None], [], "Classes of 1 labeled image"),
        ([0, 0, 1], ["--top", 1], "Classes of all 3 labeled images (the most frequent of 2)"),
        ([0, 1, 2], ["--top", 2], "Classes of all 3 labeled images (the 2 most frequent of 3)"),
        ([None], [], None),
    ],
)
def test_table_of_classes_has_a_title_and_is_left_out_without_labels(
    tmp_path: Path, predicted: list[int | None], options: list[object], title: str | None
) -> None:
    uri = str(tmp_path / "model=m-ffffffff")
    write_partition(Storage(), uri, LABELS, [{"/in/a.tar": make_predictions("/in/a.tar", LABELS, predicted)}])
    shown = " ".join(invoke(stats, uri, *options).stdout.split())
    assert shown.startswith(f"{title} label" if title else "shards 1 labeled, 0 unreadable")
