"""Tests of the end-to-end benchmark: dataset, options, and one small run."""

from __future__ import annotations

import itertools
import json
import tarfile
from pathlib import Path

import pytest

from cvt.preprocessing import Preprocessor
from jobs.benchmarks.end_to_end import make_dataset, run
from pipeline.read import NoShardsError
from tests.command import cvt_label_process, invoke
from tests.makers import make_image, make_tar

PREPROCESSOR = Preprocessor.published()


@pytest.mark.parametrize(("count", "shards"), [(1, 1), (4, 4), (5, 3), (13, 4)])
def test_dataset_has_exact_number_of_images(images: Path, tmp_path: Path, count: int, shards: int) -> None:
    tars = tmp_path / "tars"
    make_dataset(str(images), tars, PREPROCESSOR, count, cores=2)
    assert len([*tars.iterdir()]) == shards
    members: list[tuple[str, bytes]] = []
    for path in sorted(tars.iterdir()):
        with tarfile.open(path) as tar:
            members += [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    assert [name for name, _ in members] == [f"{i:09d}.jpg" for i in range(count)]
    # The sample that is not an image is omitted.
    assert [data for _, data in members] == [make_image(i % 5, format="PNG") for i in range(count)]


def test_tars_have_a_maximum_number_of_images(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.benchmarks.end_to_end._SHARD_IMAGES", 8)
    make_dataset(str(images), tmp_path / "tars", PREPROCESSOR, 20, cores=1)
    assert len([*(tmp_path / "tars").iterdir()]) == 3


def test_shards_without_decodable_images_fail(tmp_path: Path) -> None:
    source = tmp_path / "a.tar"
    source.write_bytes(make_tar([("0.png", b"not an image")]))
    with pytest.raises(NoShardsError, match="no image can be decoded"):
        make_dataset(str(source), tmp_path / "tars", PREPROCESSOR, 10, cores=1)


@pytest.mark.slow
def test_benchmark_compares_contenders_and_writes_json(images: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    data = ["--images", images, "--model", "fashion-mnist", "--count", "60,20"]
    how = ["--rounds", 1, "--batch-size", 4, "--device", "cpu", "--peers", "dataloader,daft"]
    more = ["--set", "read.chunk_images=8", "--price-per-hour", 2, "--output", figures]
    done = cvt_label_process("benchmark", "run", *data, *how, *more)  # the environment changes
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["settings"]["batch_size"] == 4
    assert {"machine", "versions", "stages_of_last_run"} < set(found)
    rows = {(row["contender"], row["images"]): row for row in found["contenders"]}
    jobs = list(itertools.product((20, 60), ("cvt-label on Ray", "cvt-label --no-ray", "dataloader", "daft")))
    assert [*rows] == [(name, count) for count, name in jobs] + [("engine alone", 60)]
    for (name, count), row in rows.items():
        if name == "daft":  # may not be installed
            continue
        assert row["failure"] is None
        assert 0 < row["first_labels_s"][0] < row["seconds"][0]
        if name != "engine alone":
            [ours] = rows["cvt-label on Ray", count]["seconds"]
            assert row["seconds_ratio"] == [pytest.approx(row["seconds"][0] / ours)]
            assert row["images_per_s"] == []  # the run is too short for a steady state
    engine = rows["engine alone", 60]
    assert engine["cost_per_million"] == pytest.approx(2 / engine["images_per_s"][0] / 3600 * 1e6)
    assert found["last_run"][0]["decoder"] == "the CPU, exact"
    assert found["seconds_of_last_run"][0]["first_commit"] > 0
    assert "dataloader" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "100,0"], "'--count': 100,0: expected positive numbers"),
        (["--bucket", "gs://bucket"], "expected s3://BUCKET"),
        (["--peers", "ray,spark"], "choose from ray, dataloader, daft, or none"),
        (["--model", "fashion-mnist", "--size", "224"], "has its own size"),
        (["--set", "decode.nothing=1", "--model", "fashion-mnist"], "--set decode.nothing=1: unknown field"),
        (["--output", "/no/such/folder/figures.json"], "folder /no/such/folder does not exist"),
    ],
)
def test_invalid_options_fail_before_measuring(images: Path, arguments: list[str], message: str) -> None:
    done = invoke(run, "--images", images, *arguments, status=2)
    assert message in " ".join(done.output.split())


def test_missing_images_end_with_4(tmp_path: Path) -> None:
    invoke(run, "--images", tmp_path, "--model", "fashion-mnist", status=4)
