"""Two pools of classifiers on a Ray cluster whose nodes drain, join and die while a run labels."""

from __future__ import annotations

from typing import Any

import pytest

from tests.own_ray import run_script
from tests.pipeline.changing_run import IMAGES, SHARDS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_script("tests.pipeline.changing_run", tmp_path_factory.mktemp("changing"), 600)


def test_each_image_is_labeled_once_by_pools_on_changing_nodes(found: dict[str, Any]) -> None:
    assert (found["samples"], found["duplicates"], found["errors"]) == (SHARDS * IMAGES, 0, 0)
    assert found["complete"]


def test_copies_of_an_image_get_the_same_label_in_all_pools(found: dict[str, Any]) -> None:
    assert found["labels"] == IMAGES
    assert found["score_difference"] < 1e-5


def test_draining_node_gets_no_new_chunk_and_finishes_its_chunks(found: dict[str, Any]) -> None:
    chunks = found["chunks"]["drained cuda"]
    assert chunks["start"] == chunks["end"] > 0
    assert found["last_start_on_drained"] < 4  # tasks that were sent before, up to four chunks


def test_both_pools_work_and_the_slow_one_gets_fewer_chunks(found: dict[str, Any]) -> None:
    done = {"cuda": 0, "cpu": 0}
    for name, chunks in found["chunks"].items():
        done[name.partition(" ")[2]] += chunks["end"]
    assert 0 < done["cpu"] < done["cuda"]


def test_new_node_takes_part_and_the_loss_of_a_node_ends(found: dict[str, Any]) -> None:
    assert found["chunks"]["joined cuda"]["end"] > 0
    assert found["stall"] < 60  # loads a classifier on the new node
    assert found["stall_after_loss"] < 120  # Ray notices a dead node after 15 s
