"""By default, a small plan runs in this process, and Ray runs all other plans."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config import IN_PROCESS, RayConfig
from pipeline.dataflow import Executor, open_executor
from pipeline.run import label, streaming
from tests.makers import make_image, make_tar
from tests.runs import run_config

MEMBERS = [(f"{i}.jpg", make_image(i)) for i in range(3)]


@pytest.fixture(autouse=True)
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Makes an input of one tar; records the addresses of the opened executors, all in this process."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(make_tar(MEMBERS))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    set_ray(monkeypatch, is_initialized=False)
    addresses: list[str | None] = []

    def open_here(settings: RayConfig) -> AbstractContextManager[Executor]:
        addresses.append(settings.address)
        return open_executor(settings.model_copy(update={"address": IN_PROCESS}))

    monkeypatch.setattr(streaming, "open_executor", open_here)
    return addresses


def set_ray(monkeypatch: pytest.MonkeyPatch, is_initialized: bool) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: is_initialized))


def run(root: Path, *overrides: str) -> None:
    assert label(run_config(root, "ray.address=null", *overrides)).totals.images == 3


def test_small_plan_runs_in_this_process(tmp_path: Path, opened: list[str | None]) -> None:
    run(tmp_path)
    assert opened == [IN_PROCESS]


def test_address_is_obeyed(tmp_path: Path, opened: list[str | None]) -> None:
    run(tmp_path, "ray.address=local")
    assert opened == ["local"]


def test_cluster_of_a_submitted_job_is_used(
    tmp_path: Path, opened: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    run(tmp_path)
    assert opened == [None]


def test_connection_to_ray_is_used(
    tmp_path: Path, opened: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_ray(monkeypatch, is_initialized=True)
    run(tmp_path)
    assert opened == [None]


def test_pools_run_on_ray(tmp_path: Path, opened: list[str | None]) -> None:
    run(tmp_path, "classify.pools=[{device: cpu}, {device: cpu, batch_size: 8}]")
    assert opened == [None]


@pytest.mark.parametrize(("size", "expected"), [(0, IN_PROCESS), (-1, None)])
def test_large_shards_are_labeled_on_ray(
    tmp_path: Path, opened: list[str | None], monkeypatch: pytest.MonkeyPatch, size: int, expected: str | None
) -> None:
    limit = (tmp_path / "in" / "0.tar").stat().st_size + size
    monkeypatch.setattr(streaming, "_SMALL_BYTES", limit)
    run(tmp_path)
    assert opened == [expected]


@pytest.mark.parametrize(("limit", "expected"), [(3, IN_PROCESS), (2, None)])
def test_many_image_files_are_labeled_on_ray(
    tmp_path: Path,
    opened: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    expected: str | None,
) -> None:
    (tmp_path / "in" / "0.tar").unlink()
    for name, data in MEMBERS:
        (tmp_path / "in" / name).write_bytes(data)
    monkeypatch.setattr(streaming, "_SMALL_IMAGES", limit)
    run(tmp_path)
    assert opened == [expected]


def test_run_after_one_that_did_not_end_is_on_ray(
    tmp_path: Path, opened: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise SystemExit(1)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_commit_results", die)
        with pytest.raises(SystemExit):
            run(tmp_path)
    run(tmp_path)
    run(tmp_path, "output.topk=2")  # of another partition
    assert opened == [IN_PROCESS, None, IN_PROCESS]
