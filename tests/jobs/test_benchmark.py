"""The benchmark: what it packs, counts and computes, and a whole small run."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.alone import LARGE, enlarged
from jobs.benchmark import cost_per_million, summary
from jobs.contenders import (
    Dataset,
    Run,
    WrongCountError,
    check_labels,
    load_subject,
    make_dataset,
    run_module,
    steady_rate,
)
from jobs.peers import Task
from pipeline.config import ConfigError
from pipeline.labelling import NoShardsError
from tests.jobs.test_cli import cvt_label
from tests.makers import make_image, make_tar

DATASET = Dataset(Path("tars"), Path("files"), 100, 8, 1000, 100, 0, "jpg")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five PNG images in two tars, and what is no image."""
    folder = tmp_path / "images"
    folder.mkdir()
    encoded = [make_image(i, format="PNG") for i in range(5)]
    members = [(f"{i}.png", data) for i, data in enumerate(encoded)]
    (folder / "a.tar").write_bytes(make_tar([*members[:2], ("broken.png", b"no image"), members[2]]))
    (folder / "b.tar").write_bytes(make_tar(members[3:]))
    return folder


def packed(dataset: Dataset) -> list[tuple[str, bytes]]:
    found = []
    for path in sorted(dataset.tars.iterdir()):
        with tarfile.open(path) as tar:
            found += [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("samples", [1, 4, 5, 13])
def test_data_is_cut_or_repeated_to_an_exact_count(images: Path, tmp_path: Path, samples: int) -> None:
    dataset = make_dataset(str(images), tmp_path, samples, cores=2)
    members = packed(dataset)
    assert [name for name, _ in members] == [f"{i:09d}.png" for i in range(samples)]
    assert [data for _, data in members] == [make_image(i % 5, format="PNG") for i in range(samples)]
    assert (dataset.images, dataset.distinct) == (samples, min(samples, 5))
    assert dataset.shards == len(list(dataset.tars.iterdir())) == min(samples, 8)
    assert dataset.bytes == sum(len(data) for _, data in members)


def test_without_a_count_each_image_is_taken_once_but_for_those_that_are_none(
    images: Path, tmp_path: Path
) -> None:
    dataset = make_dataset(str(images), tmp_path, None, cores=1)
    assert (dataset.images, dataset.distinct, dataset.left_out, dataset.shards) == (5, 5, 1, 4)


def test_unpacked_images_are_the_same(images: Path, tmp_path: Path) -> None:
    dataset = make_dataset(str(images), tmp_path, 7, cores=1)
    dataset.unpack()
    assert {path.name: path.read_bytes() for path in dataset.files.iterdir()} == dict(packed(dataset))


def test_data_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(make_tar([("0.png", b"no image")]))
    with pytest.raises(NoShardsError, match="no image that can be decoded"):
        make_dataset(str(tmp_path), tmp_path, 10, cores=1)


def write_labels(folder: Path, keys: list[str], labels: list[str | None] | None = None) -> None:
    folder.mkdir()
    columns: dict[str, Any] = {"key": keys, "label": labels or ["a"] * len(keys), "score": [0.5] * len(keys)}
    pq.write_table(pa.table(columns), folder / "labels.parquet")


def test_labels_of_every_image_are_accepted_whatever_folder_the_keys_have(tmp_path: Path) -> None:
    write_labels(tmp_path / "out", ["000000001", "file:///somewhere/000000000.jpg"])
    check_labels("dataloader", tmp_path / "out", 2)


@pytest.mark.parametrize(
    ("keys", "labels", "message"),
    [
        (["000000000", "000000001"], None, "2 labels of 2 images came out, of 3 images"),
        (["000000000", "000000001", "000000001"], None, "3 labels of 2 images"),
        (["000000000", "000000001", "000000003"], None, "3 labels of 2 images"),
        (["000000000", "000000001", "000000002"], ["a", None, "a"], "without a label"),
    ],
)
def test_a_contender_that_loses_an_image_is_refused(
    tmp_path: Path, keys: list[str], labels: list[str | None] | None, message: str
) -> None:
    write_labels(tmp_path / "out", keys, labels)
    with pytest.raises(WrongCountError, match=message):
        check_labels("dataloader", tmp_path / "out", 3)


def test_the_steady_rate_is_from_the_first_batch_to_the_last(tmp_path: Path) -> None:
    events = tmp_path / "events"
    events.write_text("32 10.0\n32 14.0\n8 15.0\n32 12.0\n")  # processes may write out of turn
    assert steady_rate("ray", events) == 72 / 5
    events.write_text("32 10.0\n")
    with pytest.raises(WrongCountError, match="too few images"):
        steady_rate("ray", events)


def test_a_million_images_cost_the_hours_that_they_take() -> None:
    assert cost_per_million(3.6, 1000) == pytest.approx(1.0)  # a thousand seconds
    assert cost_per_million(1.2, 20) == pytest.approx(1.2 * 50_000 / 3600)
    assert cost_per_million(None, 20) is None


def test_ratios_are_taken_round_by_round() -> None:
    runs = {
        "pipeline": [Run("pipeline", 100, 9.0, 20.0), Run("pipeline", 100, 9.0, 10.0)],
        "ray": [Run("ray", 100, 9.0, 10.0), Run("ray", 100, 9.0, 2.5)],
        "dataloader": [Run("dataloader", 100, 9.0, 10.0), Run("dataloader", failure="killed")],
        "daft": [Run("daft", failure="not installed: pip install daft")],
    }
    alone = [{"read": 1000.0, "decode": 16.0, "engine": 20.0}, {"read": 5.0, "decode": 40.0, "engine": 12.5}]
    found = summary(DATASET, alone, runs, 1.0)
    assert found["contenders"]["ray"]["ratios"] == [2.0, 4.0]
    assert (found["of_engine"], found["of_slowest_stage"]) == ([1.0, 0.8], [1.25, 2.0])
    assert found["contenders"]["pipeline"]["cost_per_million"] == pytest.approx(1e6 / 15 / 3600)
    assert [found["contenders"][name]["rate"] for name in ("dataloader", "daft")] == [None, None]
    assert found["contenders"]["daft"]["failure"] == "not installed: pip install daft"
    json.dumps(found)


def test_a_contender_that_hangs_or_fails_is_ended_and_says_so(tmp_path: Path) -> None:
    task = Task("", "", "png", "", 28, str(tmp_path / "output"), "", 1, "cpu", "fp32", 1)
    assert run_module(["jobs.peers", "unheard-of"], task, 60)[1] == "KeyError: 'unheard-of'"
    assert run_module(["jobs.alone"], task, 0.2) == (0.2, "not done after 0 s")


def test_a_size_is_for_random_weights() -> None:
    with pytest.raises(ConfigError, match="fashion-mnist has a size of its own"):
        load_subject("fashion-mnist", 224)


@pytest.mark.parametrize("size", [(32, 24), (1500, 1000), (2000, 1500)])
def test_images_are_enlarged_by_a_whole_factor(size: tuple[int, int]) -> None:
    data = make_image(size=size)
    width, height = Image.open(io.BytesIO(enlarged(data))).size
    assert width * height >= LARGE
    assert (width % size[0], height % size[1]) == (0, 0)
    assert (enlarged(data) == data) == (size == (2000, 1500))


def test_a_small_benchmark_counts_compares_and_writes_json(images: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    data = ["--images", images, "--model", "fashion-mnist", "--samples", 60]
    how = ["--rounds", 1, "--batch-size", 4, "--device", "cpu", "--peers", "dataloader"]
    more = ["--set", "output.topk=1", "--price-per-hour", 2, "--output", figures]
    done = cvt_label("benchmark", *data, *how, *more)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["data"] == {
        "images": 60,
        "shards": found["data"]["shards"],
        "bytes": 12 * sum(len(make_image(i, format="PNG")) for i in range(5)),
        "distinct": 5,
        "left_out": 1,
        "extension": "png",
    }
    assert found["settings"]["batch_size"] == 4
    assert {"machine", "versions", "stages", "bound_by", "timings", "of_slowest_stage"} < set(found)
    assert set(found["alone"][0]) == {"read", "decode", "engine"}
    assert set(found["contenders"]) == {"pipeline", "dataloader"}
    for contender in found["contenders"].values():
        assert (contender["failure"], contender["images"]) == (None, 60)
        assert contender["rate"] == contender["rates"][0] > 0
        assert contender["cost_per_million"] == pytest.approx(2 / contender["rate"] / 3600 * 1e6)
    pipeline, peer = found["contenders"]["pipeline"], found["contenders"]["dataloader"]
    assert peer["ratios"] == [pytest.approx(pipeline["rate"] / peer["rate"])]
    assert "DataLoader, transformers" in done.stdout
    assert "to the slowest stage alone" in done.stdout


def test_decoding_alone_is_compared_with_transformers(images: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = cvt_label("benchmark", "--images", images, "--decode-only", "--rounds", 1, "--output", figures)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())["decoding"]
    ways = {one["way"] for one in found}
    assert ways == {"decode", "decode, fast", "transformers' processor"}
    assert [one["count"] for one in found] == [5] * 2 * len(ways)
    assert all(len(one["rates"]) == len(one["ratios"]) == 1 for one in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "ray,spark"], "spark: not one of"),
        (["--model", "fashion-mnist", "--size", "224"], "has a size of its own"),
        (["--set", "decode.nothing=1", "--model", "fashion-mnist"], "decode.nothing: unknown field"),
    ],
)
def test_what_cannot_be_measured_is_told_at_once(images: Path, arguments: list[str], message: str) -> None:
    done = cvt_label("benchmark", "--images", images, *arguments)
    assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (2, True, False)
