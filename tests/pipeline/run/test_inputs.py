"""Runs over lists and patterns of URIs: increments, deleted shards, and datasets that share an output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from pipeline.compare import RunPair
from pipeline.config import ConfigError, Selection, load_config, load_train_config
from pipeline.config.job import Config
from pipeline.read import IgnoreReason, NoShardsError, list_input_shards
from pipeline.run import RunResult, label, plan_run
from pipeline.run.planning import ShardState
from pipeline.schedule.client import Submission
from pipeline.storage import Storage
from tests.makers import make_image, make_tar
from tests.runs import IN_PROCESS


def config(root: str, uris: Any, *overrides: str) -> Config:
    listed = [f"{root}/in/{uri}" for uri in uris] if isinstance(uris, list) else f"{root}/in/{uris}"
    fields = [f"input.uri={json.dumps(listed)}", f"output.uri={root}/out", *IN_PROCESS, *overrides]
    return load_config(Config, None, fields)


def write(root: str, *names: str) -> None:
    for seed, name in enumerate(names):
        image = make_image(seed, format="JPEG")
        content = image if name.endswith(".jpg") else make_tar([(f"{i}.jpg", image) for i in range(2)])
        Storage().write(f"{root}/in/{name}", content)


def keys(result: RunResult) -> list[tuple[str, str]]:
    """Returns every labeled sample of the partition: shard and key."""
    rows = [row for table in result.partition.read_labels(["shard", "key"]) for row in table.to_pylist()]
    return sorted((row["shard"].rpartition("/in/")[2], row["key"]) for row in rows)


def states(result: RunResult) -> dict[str, int]:
    return {str(state): count for state, count in result.plan.states.items() if count}


def test_overlapping_inputs_label_each_image_once_and_a_rerun_labels_nothing(bucket: str) -> None:
    write(bucket, "a/1.tar", "a/b/2.tar", "c/3.jpg", "c/4.jpg", "d.tar")
    uris = ["a", "a/b", "a/*.tar", "c/[34].jpg", "c/*.jpg", "{d,e}.tar"]
    with pytest.raises(NoShardsError, match=rf"input.uri: 1 of 7 URIs have no object: {bucket}/in/e.tar$"):
        label(config(bucket, uris))
    write(bucket, "e.tar")
    result = label(config(bucket, uris))
    found = [(f"{name}.tar", f"{i}") for name in ("a/1", "a/b/2") for i in range(2)]
    found += [(f"{name}.tar", f"{i}") for name in "de" for i in range(2)]
    group = "images-0000000000000000" + result.job.config.input.inputs.group_suffix(f"{bucket}/in")
    assert keys(result) == [*found, *((group, f"c/{i}.jpg") for i in (3, 4))]
    record = result.partition.record(result.run)
    assert record["config"]["input"]["uri"] == [f"{bucket}/in/{uri}" for uri in uris]
    assert load_config(
        Config,
        None,
        [f"input.uri={json.dumps(record['config']['input']['uri'])}", "model.path=x", "output.uri=/o"],
    ).input.inputs
    again = label(config(bucket, uris[::-1]))
    assert states(again) == {"done": 5}


def test_only_shards_of_the_input_are_deleted_and_pruned(tmp_path: Path) -> None:
    root = str(tmp_path)
    write(root, "a-1.tar", "a-2.tar", "b-1.tar", "p/x.jpg")
    label(config(root, ""))
    for name in ("a-1.tar", "b-1.tar"):
        Storage().delete(f"{root}/in/{name}")
    for uri in ("{a-2,b-1}.tar", "[b-c]-*"):
        with pytest.raises(NoShardsError):
            plan_run(config(root, uri))
    result = label(config(root, ["a-*.tar", "a-2.tar"]), Selection(prune=True))
    assert result.plan.to_prune == {f"{root}/in/a-1.tar"}
    excluded = plan_run(config(root, "", "input.exclude=[b-*]")).plan
    assert excluded.states[ShardState.DELETED] == 0
    assert plan_run(config(root, "")).plan.states[ShardState.DELETED] == 1


def test_runs_of_one_input_are_compared_whatever_the_order_of_its_uris(tmp_path: Path) -> None:
    root = str(tmp_path)
    write(root, "a-1.tar", "b-1.tar", "c.tar")
    gate = "gate.max_psi=100"
    first, other = label(config(root, ["a-*", "b-*"], gate)), label(config(root, "c.tar", gate))
    write(root, "b-2.tar")
    second = label(config(root, ["b-*", "a-*"], gate))
    pair = RunPair.find(second.partition, second.job.config.input.inputs, second.run)
    assert (pair.previous, pair.current) == (first.run, [second.run])
    assert second.partition.record(second.run)["drift"] is not None
    assert other.partition.record(other.run)["drift"] is None


def test_output_in_the_input_is_refused_for_each_uri_and_pattern(tmp_path: Path) -> None:
    root = str(tmp_path)
    write(root, "a.tar")
    for uris in (["a.tar", "../out"], ["a.tar", ""], "../**/*.parquet", "../*", ["../out/*/x", "../o*"]):
        target = f"output.uri={root}/in/labels" if uris == ["a.tar", ""] else f"output.uri={root}/out"
        with pytest.raises(ConfigError, match="is inside the input"):
            plan_run(config(root, uris, target))
    assert plan_run(config(root, "**/*.tar", f"output.uri={root}/in/labels")).plan.shards


def test_folder_in_a_labeled_image_folder_is_refused_in_any_position(tmp_path: Path) -> None:
    root = str(tmp_path)
    write(root, "p/1.jpg", "p/q/2.jpg", "x.tar")
    label(config(root, "p/**/*.jpg"))
    for uris in (["x.tar", "p/q"], "p/q/*.jpg"):
        with pytest.raises(ConfigError, match="would be labeled twice"):
            label(config(root, uris))
    assert keys(label(config(root, ["x.tar", "p"])))[:2] == [
        ("p/images-0000000000000000", "1.jpg"), ("p/images-0000000000000000", "q/2.jpg")
    ]  # fmt: skip


def test_patterns_in_one_folder_have_groups_of_their_own(tmp_path: Path) -> None:
    root, inputs = str(tmp_path), ["*.jpg", "*.png", "sub"]
    write(root, "1.jpg", "2.jpg", "sub/3.jpg")
    Storage().write(f"{root}/in/4.png", make_image(4, format="PNG"))
    for uri in inputs:
        result = label(config(root, uri), Selection(prune=True))
        assert result.plan.deleted == {}
    assert sorted(key for _, key in keys(result)) == ["1.jpg", "2.jpg", "3.jpg", "4.png"]
    for uri in inputs:
        assert states(label(config(root, uri, "input.exclude=[nothing]"))) == {"done": 1}
    with pytest.raises(ConfigError, match=r"selects some of the image files .* be labeled twice"):
        label(config(root, "[13].*"))
    wider = label(config(root, ["*.jpg", "*.png"]))
    assert (wider.totals.shards, wider.plan.copied_images) == (1, 3)
    assert sorted(key for _, key in keys(wider)) == ["1.jpg", "2.jpg", "3.jpg", "4.png"]
    assert [key for _, key in keys(label(config(root, "")))] == ["1.jpg", "2.jpg", "4.png", "sub/3.jpg"]


def test_parent_of_a_labeled_folder_replaces_its_groups(tmp_path: Path) -> None:
    root = str(tmp_path)
    write(root, "p/1.jpg", "p/q/2.jpg")
    label(config(root, "p/q"))
    result = label(config(root, "p/**/*.jpg"))
    assert [key for _, key in keys(result)] == ["1.jpg", "q/2.jpg"]


def test_excluded_objects_are_in_plan_and_record(tmp_path: Path) -> None:
    root = str(tmp_path)
    write(root, "a.tar", "val/b.tar", "c.rar")
    result = label(config(root, "", "input.exclude=[val]"))
    assert result.plan.listing.ignored == {IgnoreReason.EXCLUDED: 1, IgnoreReason.FORMAT: 1}
    assert "excluded: 1, other format: 1" in result.plan.listing.describe_ignored()
    assert ["excluded", ".tar", 1] in result.partition.record(result.run)["ignored"]


def test_delta_table_is_labeled_at_its_current_snapshot(tmp_path: Path) -> None:
    root = str(tmp_path)
    images = pa.table({"image": [make_image(i) for i in range(4)], "id": list("abcd")})
    options = ("input.key_column=id", "input.image_column=image")
    write_deltalake(f"{root}/in/t", images.slice(0, 2))
    write_deltalake(f"{root}/in/t", images.slice(2, 1), mode="append")
    assert {key for _, key in keys(label(config(root, "t", *options)))} == {"a", "b", "c"}
    write_deltalake(f"{root}/in/t", images.slice(3), mode="overwrite")
    result = label(config(root, ["t"], *options))
    assert states(result) == {"new": 1}
    assert [key for _, key in keys(result)] == ["d"]
    assert len(DeltaTable(f"{root}/in/t").files() if hasattr(DeltaTable, "files") else ["d"]) == 1
    with pytest.raises(ConfigError, match="Delta"):
        label(config(root, "", *options))


def test_training_takes_lists_and_names_its_section(tmp_path: Path) -> None:
    root = str(tmp_path)
    write(root, "a.tar", "b.tar", "val/c.tar")
    section = [f"{root}/in/{{a,b}}.tar", f"{root}/in/a.tar"]
    overrides = [
        f"train.uri={json.dumps(section)}",
        f"validation.uri={root}/in/val/*",
        "validation.exclude=[c*]",
    ]
    loaded = load_train_config(None, [*overrides, "model.pretrained=fashion-mnist", f"output.uri={root}/out"])
    assert len(list_input_shards(Storage(), loaded.train, "train.uri")) == 2
    with pytest.raises(NoShardsError, match=r"validation.uri: no shards found in .*excluded: 1"):
        list_input_shards(Storage(), loaded.validation, "validation.uri")


def test_jobs_with_other_inputs_have_other_ids() -> None:
    def job(uri: object, exclude: object = ()) -> str:
        fields = {"input": {"uri": uri, "exclude": [*exclude]}, "model": {"path": "a/b"}}
        return Submission(Config(**fields, output={"uri": "s3://o"}), "key").id

    many = [f"s3://b/{i}" for i in range(9)]
    assert len({job("s3://b/x"), job("s3://b/x", ["y"]), job(many), job([*many[:8], "s3://b/z"])}) == 4
