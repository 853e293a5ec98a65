"""Workers and nodes that die during a run delay it by seconds; no sample is lost or duplicated."""

from __future__ import annotations

from typing import Any

import pytest

from tests.own_ray import run_script
from tests.pipeline.failing_run import IMAGES, SHARDS

pytestmark = pytest.mark.slow

STALL_S = 45


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of `failing_run`: a run in which a decoder, a classifier and a node die in turn."""
    return run_script("tests.pipeline.failing_run", tmp_path_factory.mktemp("failing"), 720)


@pytest.mark.parametrize("failure", ["decoder", "classifier", "node"])
def test_run_continues_after_a_failure(run: dict[str, Any], failure: str) -> None:
    assert run["after"][failure] > 0
    assert run["stall"][failure] < STALL_S


def test_every_sample_is_labeled_exactly_once(run: dict[str, Any]) -> None:
    assert (run["samples"], run["duplicates"], run["errors"]) == (SHARDS * IMAGES, 0, 0)
    assert (run["shards"], run["complete"]) == (SHARDS, True)
