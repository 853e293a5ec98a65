"""Tests of the command `pack`: what is labeled is the same, before and after packing."""

from __future__ import annotations

import json
import re
import shlex
import tarfile
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.console import ExitStatus
from jobs.label import label as label_command
from jobs.pack import pack
from pipeline import label, load_job_config
from pipeline.storage import Storage, StorageError
from tests.command import invoke
from tests.makers import make_image, make_parquet, make_tar
from tests.runs import IN_PROCESS

NAMES = ["Bag", "Coat", "Dress"]
IMAGES = [make_image(i, format="PNG" if i % 2 else "JPEG") for i in range(6)]
TIMES = [datetime(2026, 1, 1 + i, 12, 30) for i in range(6)]
FEATURE = {"info": {"features": {"label": {"names": NAMES, "_type": "ClassLabel"}}}}
CARRY = 'input.carry=["id", "taken", "note"]'


def write_folders(root: Path) -> None:
    for i, image in enumerate(IMAGES):
        path = root / NAMES[i % 3] / f"{i}.v1.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)


def write_parquet(root: Path) -> None:
    columns = {
        "image": [{"bytes": image, "path": f"a/{i}.jpg"} for i, image in enumerate(IMAGES)],
        "label": [0, 1, 2, 0, -1, None],
        "id": pa.array([2**40 + i for i in range(6)]),
        "taken": pa.array(TIMES, pa.timestamp("us")),
        "note": ["größe", None, "x\ny", "", "7", '"'],
    }
    root.mkdir()
    (root / "0.parquet").write_bytes(make_parquet(columns, {"huggingface": json.dumps(FEATURE)}))


def write_tar(root: Path) -> None:
    members = list[tuple[str, bytes]]()
    for i, image in enumerate(IMAGES):
        fields = {"id": i, "taken": f"{TIMES[i]}", "note": {"deep": [i]}}
        members += [
            (f"x/{i}.jpg", image),
            (f"x/{i}.cls", b"%d" % i),
            (f"x/{i}.json", json.dumps(fields).encode()),
        ]
    root.mkdir()
    (root / "0.tar").write_bytes(make_tar(members))


def write_table(root: Path) -> None:
    root.mkdir()
    rows = ["uri,label,id,taken,note"]
    for i, image in enumerate(IMAGES):
        path = root.parent / f"images/{i}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image)
        rows.append(f"{path.as_uri()},{NAMES[i % 3] if i else ''},{i},{TIMES[i]},n{i}")
    (root / "0.csv").write_text("\n".join(rows))


KINDS: dict[str, tuple[Any, list[str]]] = {
    "image files": (write_folders, ["input.label_from=folder"]),
    "parquet": (write_parquet, ["input.label_column=label", CARRY]),
    "tar": (write_tar, ["input.carry={id: int64, taken: 'timestamp[us]', note: null}"]),
    "table": (write_table, ["input.format=table", "input.label_column=label", CARRY]),
}


def run_pack(*arguments: object, status: int = 0) -> tuple[dict[str, str], str]:
    """Runs `pack`; returns the fields that it prints, and standard error."""
    result = invoke(pack, *arguments, status=status)
    return dict(re.findall(r"^(\S+(?: \S+)?)  +(\S.*)$", result.stdout, re.M)), result.stderr


def rows_of(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Labels an input; returns the rows of the images."""
    config = load_job_config(None, [*IN_PROCESS, f"output.uri={folder}", *overrides])
    files = [Path(label(config).partition.uri, "predictions")]
    tables = [pq.ParquetFile(path).read() for path in sorted(files[0].rglob("*.parquet"))]
    return pa.concat_tables(tables, promote_options="permissive").to_pylist()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_input_has_the_same_labels_targets_and_columns(kind: str, tmp_path: Path) -> None:
    write, overrides = KINDS[kind]
    write(tmp_path / "in")
    original = rows_of(tmp_path / "before", f"input.uri={tmp_path / 'in'}", *overrides)
    options = [word for override in overrides for word in ("--set", override)]
    shown, _ = run_pack(tmp_path / "in", tmp_path / "tars", "--shard-size", "2KB", *options)
    assert len(list((tmp_path / "tars").glob("*.tar"))) > 1
    command = shlex.split(shown["to label"])
    packed = rows_of(tmp_path / "after", command[command.index("--set") + 1])
    by_source = {row["source_key"]: row for row in packed}
    assert len(by_source) == len(packed) == len(original) == len(IMAGES)
    for row in original:
        found = by_source[row["key"]]
        for name in {"label", "score", "target_id", "error", "id", "taken", "note"} & row.keys():
            expected = pytest.approx(row[name], rel=1e-4) if name == "score" else row[name]
            assert found[name] == expected, name
        assert found["source_uri"] == row["uri"]
    if kind != "tar":
        assert shown["packed"].startswith("6 images, ")
    assert {row["target_id"] for row in packed} > {None} or kind in ("tar", "image files")


def test_columns_that_json_lacks_are_packed(tmp_path: Path) -> None:
    write_table(tmp_path / "in")
    (tmp_path / "in/0.csv").unlink()
    columns = {
        "wait": pa.array([1, None, 3], pa.duration("ns")),
        "hash": pa.array([2**64 - 1, None, 3], pa.uint64()),
        "tags": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int32())),
    }
    uris = [(tmp_path / f"images/{i}.bin").as_uri() for i in range(3)]
    (tmp_path / "in/0.parquet").write_bytes(make_parquet({"uri": uris, **columns}))
    options = ["input.format=table", "input.carry=[wait, hash, tags]"]
    shown, _ = run_pack(
        tmp_path / "in", tmp_path / "tars", *(word for option in options for word in ("--set", option))
    )
    packed = rows_of(tmp_path / "after", shlex.split(shown["to label"])[-1])
    original = rows_of(tmp_path / "before", f"input.uri={tmp_path / 'in'}", *options)
    assert [row["error"] for row in packed] == [None] * 3
    assert [row["wait"] for row in packed] == [row["wait"] for row in original]
    assert [row["hash"] for row in packed] == ["18446744073709551615", None, "3"]
    assert [row["tags"] for row in packed] == ['[["a", 1]]', None, "[]"]


def test_images_are_stored_unchanged_under_numbers(tmp_path: Path) -> None:
    gif, png = make_image(format="GIF"), make_image(format="PNG")
    source = tmp_path / "in"
    for name, content in {"a/b.c.jpg": png, "a/b.c.png": gif, "a/b_c.gif": png, "d.jpeg": gif}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    run_pack(source, tmp_path / "tars")
    with tarfile.open(tmp_path / "tars/00000.tar") as tar:
        found = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    images = {name: content for name, content in found.items() if not name.endswith(".json")}
    assert images == {"000000000.png": png, "000000001.gif": gif, "000000002.png": png, "000000003.gif": gif}
    assert json.loads(found["000000001.json"]) == {
        "source_uri": f"{source}/a/b.c.png",
        "source_key": "a/b.c.png",
    }
    run_pack(source, tmp_path / "again")
    assert (tmp_path / "again/00000.tar").read_bytes() == (tmp_path / "tars/00000.tar").read_bytes()


def test_images_of_a_sample_that_are_not_packed_are_listed(tmp_path: Path) -> None:
    members = {"a.left.png": IMAGES[1], "a.right.png": IMAGES[3]}
    (tmp_path / "in.tar").write_bytes(make_tar(members))
    shown, errors = run_pack(tmp_path / "in.tar", tmp_path / "tars", status=ExitStatus.INCOMPLETE)
    assert shown["not packed"] == "merged image: 1"
    assert "'a': 1 further images" in errors
    run_pack(tmp_path / "in.tar", tmp_path / "both", "--set", "input.key=last-dot")


def test_unreadable_images_and_shards_are_listed_and_all_others_packed(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name, content in {
        "a.jpg": make_image(),
        "b.jpg": b"<html>",
        "c.jpg": b"",
        "d.tar": b"x" * 2000,
    }.items():
        (source / name).write_bytes(content)
    shown, errors = run_pack(source, tmp_path / "tars", status=ExitStatus.INCOMPLETE)
    assert shown["packed"].startswith("1 images, 0 labels")
    assert shown["not packed"] == "empty image: 1, unreadable shard: 1, unsupported format: 1"
    assert "b.jpg: unsupported format: the file starts with b'<html>'" in errors
    assert "d.tar: not a tar" in errors
    assert "exclude it by input.exclude, and run the command again with an empty folder" in errors


def test_label_outside_of_the_class_names_is_reported_and_not_stored(tmp_path: Path) -> None:
    (tmp_path / "in.parquet").write_bytes(
        make_parquet({"image": IMAGES[:2], "label": [7, 1]}, {"huggingface": json.dumps(FEATURE)})
    )
    options = ["--set", "input.label_column=label"]
    shown, errors = run_pack(
        tmp_path / "in.parquet", tmp_path / "tars", *options, status=ExitStatus.INCOMPLETE
    )
    assert shown["packed"].startswith("2 images, 1 label")
    assert "only the label: 7 is not in 0..2" in errors


@pytest.mark.parametrize(
    ("shards", "size", "message"),
    [
        ("full", "1GB", "choose an empty folder"),
        ("in/x", "1GB", "inside the input"),
        ("new", "big", "could not parse"),
        ("new", "9GB", "4294967296"),
    ],
)
def test_folder_with_objects_and_wrong_size_are_refused(
    shards: str, size: str, message: str, tmp_path: Path
) -> None:
    for name in ("in/a.jpg", "full/x"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(make_image())
    result = invoke(pack, tmp_path / "in", tmp_path / shards, "--shard-size", size, status=ExitStatus.USAGE)
    assert message in result.stderr
    assert not list(tmp_path.rglob("*.tar"))


def test_printed_command_labels_the_tars(tmp_path: Path) -> None:
    config = tmp_path / "my job.yaml"
    config.write_text(
        f"input: {{uri: {tmp_path}/in}}\nmodel: {{path: fashion-mnist}}\noutput: {{uri: {tmp_path}/labels}}\n"
    )
    write_folders(tmp_path / "in")
    options = ["--set", "input.label_from=folder", "--set", "output.topk=2"]
    shown, _ = run_pack(tmp_path / "in", tmp_path / "tars", "--config", config, *options)
    command = shlex.split(shown["to label"])
    assert command[:2] == ["cvt-label", "label"]
    invoke(label_command, *command[2:], "--no-ray")
    [file] = (tmp_path / "labels").rglob("predictions/**/*.parquet")
    table = pq.ParquetFile(file).read()
    assert len(table) == len(IMAGES)
    assert {len(ids) for ids in table["topk_label_ids"].to_pylist()} == {2}


def test_failed_write_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Storage, uri: str, *arguments: object) -> None:
        raise StorageError(uri, "no space left")

    write_folders(tmp_path / "in")
    monkeypatch.setattr(Storage, "write", fail)
    result = invoke(pack, tmp_path / "in", tmp_path / "tars", status=ExitStatus.UNAVAILABLE)
    assert "00000.tar: no space left; run the command again with an empty folder for SHARDS" in result.stderr


def test_tars_are_written_to_a_bucket(bucket: str, storage: Storage, tmp_path: Path) -> None:
    storage.write(f"{bucket}/in/a.jpg", IMAGES[0])
    run_pack(f"{bucket}/in", f"{bucket}/tars")
    assert [info.uri for info in storage.list(f"{bucket}/tars")] == [f"{bucket}/tars/00000.tar"]
