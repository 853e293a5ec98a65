"""Runs over growing tables of image URIs: only new and changed images are requested."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.config import Selection
from pipeline.read import Sample, Shard, list_samples
from pipeline.run import RunResult, label
from pipeline.storage import Storage, read_table
from tests.http_server import Answer, HttpServer
from tests.makers import make_image, make_parquet
from tests.runs import run_config


def run(root: Path, *fields: str, selection: Selection | None = None) -> RunResult:
    return label(run_config(str(root), "input.format=table", *fields), selection or Selection())


def rows(root: Path) -> list[dict[str, Any]]:
    storage, tables = Storage(), []
    for info in storage.list(f"{root}/out"):
        if "/predictions/" in info.uri:
            with storage.open(info.uri) as file:
                tables.append(read_table(file))
    return sorted(
        (row for table in tables for row in table.to_pylist()), key=lambda row: (row["shard"], row["index"])
    )


def write(root: Path, uris: list[str], name: str = "t.parquet") -> None:
    Storage().write(f"{root}/in/{name}", make_parquet({"id": [*range(len(uris))], "url": pa.array(uris)}))


@pytest.fixture
def server() -> Any:
    with HttpServer() as found:
        for i in range(40):
            found.add(f"/{i}.png", Answer(make_image(i, format="PNG"), headers={"ETag": f'"{i}"'}))
        yield found


def test_appended_rows_alone_are_requested(server: HttpServer, tmp_path: Path) -> None:
    uris = [f"{server.url}/{i}.png" for i in range(40)] + [f"{server.url}/missing.png"]
    write(tmp_path, uris[:30])
    first = run(tmp_path)
    assert (first.totals.images, server.count().total()) == (30, 30)
    server.requests.clear()
    assert run(tmp_path).plan.shards == []
    assert server.requests == []
    write(tmp_path, uris)
    write(tmp_path, uris[:2], "next.parquet")
    second = run(tmp_path)
    assert second.totals.images == 43
    counts = {f"/{i}.png": 1 for i in (0, 1, *range(30, 40))}
    assert server.count() == counts | {"/missing.png": 1}
    found = rows(tmp_path)
    assert [(row["uri"], row["key"]) for row in found] == [(uri, uri) for uri in [*uris[:2], *uris]]
    assert [row["version"] for row in found[2:42]] == [
        f"{i}-{len(make_image(i, format='PNG'))}" for i in range(40)
    ]
    assert [row["error"] is None for row in found] == [True] * 42 + [False]


def test_replaced_images_are_requested_again_if_servers_are_asked(server: HttpServer, tmp_path: Path) -> None:
    write(tmp_path, [f"{server.url}/{i}.png" for i in range(10)])
    run(tmp_path, "input.check_objects=always")
    server.add("/3.png", Answer(make_image(99, format="PNG"), headers={"ETag": '"new"'}))
    server.requests.clear()
    assert run(tmp_path).plan.describe() != ""
    server.requests.clear()
    run(tmp_path, "input.check_objects=always")
    assert [request.path for request in server.requests if request.method == "GET"] == ["/3.png"]
    assert [row["version"].partition("-")[0] for row in rows(tmp_path)] == [*"012", "new", *"456789"]


def test_rows_of_local_images_follow_the_images(tmp_path: Path) -> None:
    storage = Storage()
    for i in range(5):
        storage.write(f"{tmp_path}/in/{i}.jpg", make_image(i))
    write(tmp_path, [f"{i}.jpg" for i in range(5)])
    run(tmp_path, "input.key_column=id")
    storage.write(f"{tmp_path}/in/2.jpg", make_image(50))
    result = run(tmp_path, "input.key_column=id")
    assert result.plan.copied_images == 4
    found = rows(tmp_path)
    assert [row["key"] for row in found] == [*"01234"]
    assert found[2]["version"] == storage.version(f"{tmp_path}/in/2.jpg")


def test_rewritten_files_of_a_delta_table_move_their_rows(server: HttpServer, tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    uris = [f"{server.url}/{i}.png" for i in range(20)]
    for part in (uris[:10], uris[10:]):
        deltalake.write_deltalake(f"{tmp_path}/in", pa.table({"url": part}), mode="append")
    run(tmp_path)
    before = rows(tmp_path)
    server.requests.clear()
    deltalake.DeltaTable(f"{tmp_path}/in").delete(f"url = '{uris[3]}'")
    deltalake.DeltaTable(f"{tmp_path}/in").optimize.compact()
    result = run(tmp_path, selection=Selection(prune=True))
    assert server.requests == []
    assert result.plan.to_prune == set()
    expected = "19 images: 19 new; 0 to label (19 unchanged are copied), 0 to prune"
    assert result.plan.describe() == expected
    found = {row["uri"]: row for row in rows(tmp_path)}
    assert (len(rows(tmp_path)), {*found}) == (19, {*uris} - {uris[3]})
    same = ("label", "score", "version", "error")
    for row in before:
        if row["uri"] != uris[3]:
            assert [found[row["uri"]][name] for name in same] == [row[name] for name in same]


def test_rows_of_a_shorter_table_are_in_no_two_files(server: HttpServer, tmp_path: Path) -> None:
    uris = [f"{server.url}/{i % 40}.png?{i}" for i in range(1100)]
    write(tmp_path, uris)
    run(tmp_path)
    server.requests.clear()
    write(tmp_path, uris[200:])
    result = run(tmp_path)
    assert [row["uri"] for row in rows(tmp_path)] == uris[200:]
    assert server.requests == []
    assert result.plan.copied_images == 900


def test_next_s3_inventory_reads_new_and_changed_objects_alone(
    storage: Storage, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested = list[str]()
    read = Storage.read

    def recording(self: Storage, uri: str, *args: Any, **options: Any) -> bytes:
        requested.append(uri.rpartition("/")[2])
        return read(self, uri, *args, **options)

    monkeypatch.setattr(Storage, "read", recording)
    name = bucket.removeprefix("s3://")

    def take_inventory(day: str) -> str:
        infos = list(storage.list(f"{bucket}/images"))
        lines = (
            f'"{name}","{x.uri[len(bucket) + 1 :]}","{x.size}","{x.version.split("-")[0]}"' for x in infos
        )
        storage.write(f"{bucket}/inv/data/{day}.csv.gz", gzip.compress("\n".join(lines).encode()))
        manifest = {"destinationBucket": f"arn:aws:s3:::{name}", "fileFormat": "CSV"}
        manifest |= {"fileSchema": "Bucket, Key, Size, ETag", "files": [{"key": f"inv/data/{day}.csv.gz"}]}
        uri = f"{bucket}/inv/{day}/manifest.json"
        storage.write(uri, json.dumps(manifest).encode())
        return uri

    for i in range(4):
        storage.write(f"{bucket}/images/{i}.png", make_image(i, format="PNG"))
    run(tmp_path, f"input.uri={take_inventory('monday')}")
    storage.write(f"{bucket}/images/1.png", make_image(11, format="PNG"))
    storage.write(f"{bucket}/images/4.png", make_image(4, format="PNG"))
    storage.delete(f"{bucket}/images/0.png")
    tuesday = take_inventory("tuesday")
    requested.clear()
    run(tmp_path, f"input.uri={tuesday}")
    assert sorted(x for x in requested if x.endswith(".png")) == ["1.png", "4.png"]
    found = [(row["uri"], row["version"]) for row in rows(tmp_path)]
    assert found == [(info.uri, info.version) for info in storage.list(f"{bucket}/images")]


def test_first_run_does_not_look_for_stored_rows(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = list[str]()

    def list_shard(shard: Shard) -> list[Sample]:
        planned.append(shard.uri)
        return list_samples(shard)

    monkeypatch.setattr("pipeline.run.copied_rows.list_samples", list_shard)
    write(tmp_path, [f"{server.url}/{i}.png" for i in range(4)])
    run(tmp_path)
    assert planned == []
    write(tmp_path, [f"{server.url}/{i}.png" for i in range(6)])
    assert run(tmp_path).plan.copied_images == 4
    assert {*planned} == {f"{tmp_path}/in/t.parquet/rows-000000000000"}


def test_each_file_that_loses_rows_is_read_once(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltalake = pytest.importorskip("deltalake")
    monkeypatch.setattr("pipeline.read.tables._SHARD_ROWS", 5)
    uris = [f"{server.url}/{i}.png" for i in range(40)]
    deltalake.write_deltalake(f"{tmp_path}/in", pa.table({"url": uris}))
    run(tmp_path)
    reads = 0

    def read_file(file: Any, columns: list[str]) -> pa.Table:
        nonlocal reads
        reads += "score" in columns  # the plan reads other columns
        return read_table(file, columns)

    monkeypatch.setattr("pipeline.run.copied_rows.read_table", read_file)
    order = [uris[8 * (i % 5) + i // 5] for i in range(40)]
    deltalake.write_deltalake(f"{tmp_path}/in", pa.table({"url": order}), mode="overwrite")
    server.requests.clear()
    run(tmp_path)
    assert (reads, server.requests) == (8, [])
    assert [row["uri"] for row in rows(tmp_path)] == order


@pytest.mark.parametrize("relabel", [False, True])
@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_rows_that_shift_in_a_table_are_copied_and_never_in_two_files(
    server: HttpServer, tmp_path: Path, name: str, relabel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.read.tables._SHARD_ROWS", 4)
    monkeypatch.setattr("pipeline.commit.committer.MAX_CONCURRENT_WRITES", 1)
    uris = [f"{server.url}/{i}.png" for i in range(16)]

    def write_table(uris: list[str]) -> None:
        write(tmp_path, uris, "t.parquet")
        if name == "t.csv":
            (tmp_path / "in" / "t.parquet").unlink()
            (tmp_path / "in" / name).write_text("\n".join(["url", *uris]))

    write_table(uris)
    run(tmp_path)
    update, seen = Storage.update, list[int]()

    def checked(storage: Storage, uri: str, *args: Any) -> Any:
        result = update(storage, uri, *args)
        found = [row["uri"] for row in rows(tmp_path)]
        seen.append(len(found) - len({*found}))
        return result

    monkeypatch.setattr(Storage, "update", checked)
    edits = [uris[1:], uris[:], [*uris[:6], f"{server.url}/20.png", *uris[6:]]]
    for edited, requested in zip(edits, ([], ["/0.png"], ["/20.png"]), strict=True):
        server.requests.clear()
        write_table(edited)
        run(tmp_path, "read.chunk_images=1", selection=Selection(relabel=relabel))
        assert [row["uri"] for row in rows(tmp_path)] == edited
        expected = requested if not relabel else [uri.removeprefix(server.url) for uri in edited]
        assert sorted(request.path for request in server.requests) == sorted(expected)
    assert seen
    assert not any(seen)


def test_rewritten_data_files_outside_the_folder_of_their_table_lose_their_labels(
    server: HttpServer, tmp_path: Path
) -> None:
    memory = pytest.importorskip("pyiceberg.catalog.memory")
    catalog = memory.InMemoryCatalog("test", warehouse=f"file://{tmp_path}/catalog")
    catalog.create_namespace("db")
    data = pa.table({"url": [f"{server.url}/{i}.png" for i in range(4)]})
    table = catalog.create_table(
        "db.images",
        data.schema,
        location=f"file://{tmp_path}/in",
        properties={"write.data.path": f"file://{tmp_path}/data"},
    )
    table.append(data)
    run(tmp_path)
    server.requests.clear()
    table.overwrite(data.slice(1))
    result = run(tmp_path)
    assert [row["key"] for row in rows(tmp_path)] == data["url"].to_pylist()[1:]
    assert (server.requests, result.plan.deleted_with_labels.keys()) == ([], result.plan.replaced)


def test_labels_of_an_image_table_follow_its_snapshot(tmp_path: Path) -> None:
    """Files that a deletion or a compaction replaced are labeled no longer, without `--prune`."""
    deltalake = pytest.importorskip("deltalake", reason="deltalake is not installed")
    images = [make_image(number) for number in range(6)]
    table = pa.table({"image": images, "id": pa.array(range(6), pa.int64())})
    deltalake.write_deltalake(f"{tmp_path}/in", table.slice(0, 3))
    deltalake.write_deltalake(f"{tmp_path}/in", table.slice(3), mode="append")
    run(tmp_path, "input.format=auto", "input.key_column=id")
    assert sorted(row["key"] for row in rows(tmp_path)) == list("012345")
    deltalake.DeltaTable(f"{tmp_path}/in").delete("id < 2")
    run(tmp_path, "input.format=auto", "input.key_column=id")
    assert sorted(row["key"] for row in rows(tmp_path)) == list("2345")
    deltalake.DeltaTable(f"{tmp_path}/in").optimize.compact()
    run(tmp_path, "input.format=auto", "input.key_column=id")
    assert sorted(row["key"] for row in rows(tmp_path)) == list("2345")


def test_secrets_of_uris_are_in_no_default_key(tmp_path: Path) -> None:
    write(tmp_path, ["http://user:hunter2@127.0.0.1:1/a.png", "s3://AKIA:hunter2@bucket/b.png"])
    run(tmp_path, "gate.max_error_fraction=null")
    assert [row["error"].partition(":")[0] for row in rows(tmp_path)] == ["invalid uri"] * 2
    assert "hunter2" not in repr(rows(tmp_path))
