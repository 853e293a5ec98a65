"""Labels of the dataset that are no classes of the model cost no prediction, and are reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.label import print_result
from pipeline import RunResult, label
from pipeline.config import Config, ConfigError, load_config
from pipeline.read import IgnoreReason
from pipeline.read.targets import folder_label
from pipeline.run.stored import find_partition
from pipeline.storage import Storage
from tests.cases import case_input
from tests.makers import make_image, make_parquet, make_tar
from tests.runs import IN_PROCESS, run_config

#: Hugging Face's names of the classes, in alphabetical order, as class ids of the bundled model.
ALPHABETICAL = [9, 8, 4, 3, 2, 5, 6, 7, 0, 1]


def rows_of(result: RunResult) -> list[dict[str, object]]:
    return [row for table in result.partition.read_labels() for row in table.to_pylist()]


def record_of(result: RunResult) -> dict[str, Any]:
    return result.partition.record(result.run)


def test_targets_of_another_dataset_cost_no_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ImageNet's labels with a model of ten classes: 495 of 500 targets are no classes of the model."""
    images = [make_image(i) for i in range(10)]
    for shard in range(2):
        members = []
        for i in range(shard * 250, shard * 250 + 250):
            class_id = i if i < 5 else 10 + i
            members += [(f"{i:03d}.jpg", images[i % 10]), (f"{i:03d}.cls", str(class_id).encode())]
        Storage().write(f"{tmp_path}/in/{shard}.tar", make_tar(members))
    result = label(run_config(tmp_path, "read.chunk_images=250"))
    rows = rows_of(result)
    assert (len(rows), result.totals.errors, result.totals.unmatched.count) == (500, 0, 495)
    assert all(row["error"] is None and row["label"] is not None for row in rows)
    assert [row["target_id"] for row in rows] == [0, 1, 2, 3, 4, *[None] * 495]
    record = record_of(result)
    assert record["counts"] | {"errors": 0, "unmatched_targets": 495} == record["counts"]
    assert record["unmatched_targets"][0]["count"] == 395
    manifest = result.partition.manifest.read(["errors", "unmatched_targets"]).to_pylist()
    assert manifest == [{"errors": 0, "unmatched_targets": n} for n in (245, 250)]
    print_result(result)
    assert "495 targets" in (notice := capsys.readouterr().err)
    assert "is not in 0..9" in notice
    assert "input.labels: false" in notice
    page = Storage().read(f"{result.partition.uri}/report.html").decode()
    assert "Unmatched targets" in page
    assert "is not in 0..9" in page


def test_ids_of_hugging_face_class_labels_stand_for_their_names(tmp_path: Path) -> None:
    settings = [f"input.uri={case_input('hf-classlabel')}", f"output.uri={tmp_path}", *IN_PROCESS]
    result = label(load_config(Config, None, [*settings, "input.label_column=label"]))
    rows = rows_of(result)
    assert [row["target_id"] for row in rows] == ALPHABETICAL
    assert [row["error"] for row in rows] == [None] * 10
    assert result.totals.unmatched.count == 0


def test_name_of_a_class_label_that_the_model_lacks_is_unmatched(tmp_path: Path) -> None:
    names = ["Bag", "3", "Ankle Boot", "T-shirt/top"]
    feature = {"info": {"features": {"y": {"names": names, "_type": "ClassLabel"}}}}
    table = make_parquet(
        {"image": [make_image(i) for i in range(6)], "y": [0, 1, 2, 3, -1, 4]},
        metadata={"huggingface": json.dumps(feature)},
    )
    Storage().write(f"{tmp_path}/in/x.parquet", table)
    result = label(run_config(tmp_path, "input.label_column=y"))
    assert [row["target_id"] for row in rows_of(result)] == [8, None, None, 0, None, None]
    causes = [each["cause"] for each in result.totals.unmatched.to_record()]
    model = "is not a class of the model"
    assert causes == [f"'3' {model}", f"'Ankle Boot' {model}; did you mean 'Ankle boot'?", "4 is not in 0..3"]


def test_class_is_the_folder_of_an_image_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        "Bag/1.jpg",
        "Bag/2.jpg",
        "x/Coat/1.jpg",
        "3/1.jpg",
        "Ankle%20boot/1.jpg",
        "Größe 3/1.jpg",
        "1.jpg",
    ]
    for i, name in enumerate(names):
        Storage().write(f"{tmp_path}/in/{name}", make_image(i))
    result = label(run_config(tmp_path, "input.label_from=folder", 'input.target_map={"Größe 3": "Dress"}'))
    targets = {str(row["key"]): row["target_id"] for row in rows_of(result)}
    assert targets == dict(zip(names, [8, 8, 4, 3, None, 3, None], strict=True))
    [unmatched] = record_of(result)["unmatched_targets"]
    assert (unmatched["cause"], unmatched["count"]) == ("'Ankle%20boot' is not a class of the model", 1)
    print_result(result)
    assert "1 target ('Ankle%20boot' is not a class of the model: 1); map classes" in capsys.readouterr().err
    plain = label(run_config(tmp_path))
    assert plain.partition.uri != result.partition.uri
    assert {row["target_id"] for row in rows_of(plain)} == {None}
    assert plain.totals.unmatched.count == 0


def test_class_is_the_folder_in_the_uri_of_a_table_and_in_the_key_of_a_tar(tmp_path: Path) -> None:
    Storage().write(f"{tmp_path}/images/Sandal/0.jpg", make_image())
    csv = "uri,key,label\n../images/Sandal/0.jpg,Coat/0,Bag\n,x,Bag\n"
    Storage().write(f"{tmp_path}/in/t.csv", csv.encode())
    fields = ["input.label_from=folder", "input.label_column=label", "input.key_column=key"]
    result = label(run_config(tmp_path, "input.format=table", "input.uri_column=uri", *fields))
    assert [row["target_id"] for row in rows_of(result)] == [5, None]
    assert record_of(result)["unmatched_targets"] == []
    assert folder_label("http://127.0.0.1:1/Ankle%20boot/1.jpg?x=/y/z") == "Ankle boot"
    assert [folder_label(uri) for uri in ("s3://b/1.jpg", "1.jpg", "s3://b/x%20/1.jpg")] == [
        None,
        None,
        "x%20",
    ]
    members = [
        ("Sandal/0.jpg", make_image()),
        ("Sandal/0.cls", b"8"),
        ("1.jpg", make_image(1)),
        ("1.cls", b"8"),
    ]
    Storage().write(f"{tmp_path}/in/x.tar", make_tar(members))
    assert [row["target_id"] for row in rows_of(label(run_config(tmp_path, *fields[:1])))] == [5, 8]


@pytest.mark.parametrize(
    ("settings", "targets"),
    [
        (["input.label_from=folder"], [3, 7, None]),
        (["input.label_from=folder", "input.label_column=label"], [3, 7, None]),
        (["input.label_from=folder", "input.label_column=y"], [None] * 3),
        (["input.label_from=folder", "input.labels=false"], [None] * 3),
        ([], [None] * 3),
    ],
)
def test_class_is_in_a_folder_of_a_partitioned_dataset(
    tmp_path: Path, settings: list[str], targets: list[int | None]
) -> None:
    settings = [f"input.uri={case_input('hive-label')}", f"output.uri={tmp_path}", *IN_PROCESS, *settings]
    result = label(load_config(Config, None, settings))
    assert (result.is_complete, result.totals.errors) == (True, 0)
    assert [row["target_id"] for row in rows_of(result)] == targets
    missing = "the path has no folder y=value (label_from: folder)"
    causes = {each["cause"]: each["count"] for each in record_of(result)["unmatched_targets"]}
    assert causes == ({missing: 3} if "input.label_column=y" in settings else {})


def test_missing_label_column_names_the_setting_for_folders(tmp_path: Path) -> None:
    settings = [f"input.uri={case_input('hive-label')}", f"output.uri={tmp_path}", *IN_PROCESS]
    result = label(load_config(Config, None, [*settings, "input.label_column=label"]))
    errors = [str(row.error) for row in result.totals.unreadable]
    assert len(errors) == 3
    hint = "set input.label_column (in the name of a folder: input.label_from: folder);"
    assert all(hint in error for error in errors)


def test_file_of_a_map_is_part_of_the_fingerprint_by_its_content(tmp_path: Path) -> None:
    Storage().write(f"{tmp_path}/in/x.tar", make_tar({"a.jpg": make_image(1), "a.cls": b"taschen"}))
    file, other = tmp_path / "map.json", tmp_path / "other.json"
    for path in (file, other):
        path.write_text('{"taschen": "Bag"}')
    config = run_config(tmp_path, f"input.target_map={file}")
    first = label(config)
    assert [row["target_id"] for row in rows_of(first)] == [8]
    assert label(run_config(tmp_path, f"input.target_map={other}")).partition.uri == first.partition.uri
    assert find_partition(config).uri == first.partition.uri  # by the configuration, without a model
    file.write_text('{"taschen": "Coat"}')
    second = label(config)
    assert [row["target_id"] for row in rows_of(second)] == [4]
    assert second.partition.uri != first.partition.uri
    file.write_text('{"taschen": "Bags"}')
    with pytest.raises(
        ConfigError, match=r"input\.target_map: .*map\.json: 'taschen': 'Bags' is not a class"
    ):
        label(config)
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize("format", ["auto", "webdataset"])
def test_metadata_next_to_tars_is_ignored(
    tmp_path: Path, format: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = case_input("img2dataset-folder")
    caplog.set_level("INFO", "cvt_label")
    settings = [f"input.uri={source}", f"output.uri={tmp_path}", f"input.format={format}", *IN_PROCESS]
    result = label(load_config(Config, None, settings))
    assert (result.is_complete, result.totals.images, result.totals.errors) == (True, 6, 0)
    assert result.plan.listing.ignored == {IgnoreReason.METADATA: 4}
    [logged] = [each for each in caplog.records if each.getMessage().startswith("ignored: ")]
    assert logged.levelname == "INFO"  # nobody needs to act
    assert "4 objects (metadata of a tar: 4), extensions: .parquet 2, .json 2" in logged.getMessage()


@pytest.mark.parametrize(
    ("name", "setting", "is_named"),
    [
        ("x.tar", "label_field=klass", True),
        ("x.tar", "label_field=class", False),
        ("x.tar", "label_field=other", False),  # an unmatched label
        ("1.jpg", "label_column=y", True),
        ("1.jpg", "label_from=folder", True),
        ("1.jpg", "target_map={a: Bag}", True),
        ("1.jpg", "labels=true", False),
    ],
)
def test_label_source_without_any_label_is_a_warning(
    tmp_path: Path, name: str, setting: str, is_named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    content = make_image()
    if name == "x.tar":
        content = make_tar([("1.jpg", content), ("1.json", b'{"class": "Bag", "other": "Bagg"}')])
    Storage().write(f"{tmp_path}/in/{name}", content)
    label(run_config(tmp_path, f"input.{setting}"))
    messages = [each.getMessage() for each in caplog.records if "has a label" in each.getMessage()]
    field = setting.partition("=")[0]
    message = f"input.{field}: no image of this run has a label; check the field"
    assert messages == ([message] if is_named else [])


def test_every_file_is_labeled_or_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "in"
    shutil.copytree(case_input("tar-compressed"), source)
    for name in ("x.zip", "x.tar.br", "notes"):
        (source / name).write_bytes(b"x")
    result = label(run_config(tmp_path))
    read = {shard.uri for shard in result.plan.shards}
    ignored = {str(path) for path in source.iterdir()} - read
    assert f"{source}/good.tar" in read - {row.uri for row in result.totals.unreadable}
    assert len(ignored) == result.plan.listing.ignored.total() >= 3
    [warning] = [each for each in caplog.records if each.getMessage().startswith("ignored: ")]
    assert warning.levelname == "WARNING"
    assert all(uri in warning.getMessage() for uri in ignored)
    extensions = {extension: count for _, extension, count in record_of(result)["ignored"]}
    assert sum(extensions.values()) == len(ignored)
    page = Storage().read(f"{result.partition.uri}/report.html").decode()
    assert "Ignored objects of the input" in page
    for extension in extensions:
        assert extension in page
        assert extension in result.plan.listing.describe_ignored()
