"""Tables of image URIs: files, columns, filters, snapshots, inventories, and the versions of objects."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.local_s3 import LocalS3
from pipeline.config import ConfigError, InputConfig
from pipeline.predictions import ErrorCategory, deserialize_table
from pipeline.read import (
    IgnoreReason,
    NoShardsError,
    ReadOptions,
    Sample,
    Shard,
    ShardListing,
    list_shards,
    read_samples,
)
from pipeline.read.reader import list_samples, select_images
from pipeline.read.snapshots import snapshot_files
from pipeline.read.tables import find_versions, select_rows
from pipeline.storage import ABSENT, Storage, StorageError
from tests.fault_proxy import FaultProxy
from tests.http_server import Answer, HttpServer
from tests.makers import category_of, make_image, make_parquet

ROWS = [
    {"id": i, "uri": f"images/{i}.jpg", "label": i % 3, "split": "test" if i % 4 else "train"}
    for i in range(12)
]


def write_images(storage: Storage, folder: str, count: int = 12) -> None:
    for i in range(count):
        storage.write(f"{folder}/images/{i}.jpg", make_image(i))


def listing(storage: Storage, uri: str | list[str], **fields: Any) -> ShardListing:
    section = InputConfig(uri=uri, format="table", **fields)
    return list_shards(storage, section)


def samples(storage: Storage, uri: str, **fields: Any) -> list[Sample]:
    """Reads all samples of a table."""
    options = ReadOptions(InputConfig(uri=uri, format="table", **fields))
    return [x for shard in listing(storage, uri, **fields) for x in read_samples(storage, shard, options)]


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",", end: str = "\n", header: bool = True) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter, lineterminator=end)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def as_json(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


TABLE = pa.Table.from_pylist(ROWS)
FILES = {
    "t.csv": as_csv(ROWS),
    "crlf.csv": b"\xef\xbb\xbf" + as_csv(ROWS, end="\r\n"),
    "semicolon.csv": as_csv(ROWS, ";"),
    "blank-lines.csv": b"\n\r\n" + as_csv(ROWS),
    "t.tsv": as_csv(ROWS, "\t"),
    "t.csv.gz": gzip.compress(as_csv(ROWS)),
    "t.jsonl": as_json(ROWS),
    "part-0.json": as_json(ROWS),
    "t.ndjson.gz": gzip.compress(as_json(ROWS)),
    "t.txt": "\n\n".join(row["uri"] for row in ROWS).encode(),
    "t.parquet": make_parquet({name: TABLE[name] for name in TABLE.column_names}),
    "views.parquet": make_parquet({"uri": TABLE["uri"].cast(pa.string_view())}),
    "dictionary.parquet": make_parquet({"uri": TABLE["uri"].combine_chunks().dictionary_encode()}),
    "binary.parquet": make_parquet({"uri": TABLE["uri"].cast(pa.large_binary())}),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_has_the_same_samples(name: str, tmp_path: Path) -> None:
    storage, folder = Storage(), str(tmp_path)
    write_images(storage, folder)
    storage.write(f"{folder}/{name}", FILES[name])
    found = samples(storage, folder)
    assert [sample.key for sample in found] == [row["uri"] for row in ROWS]
    assert [sample.image for sample in found] == [make_image(i) for i in range(12)]
    assert [sample.uri for sample in found] == [f"{folder}/{row['uri']}" for row in ROWS]
    assert [sample.version for sample in found] == [storage.version(str(sample.uri)) for sample in found]


def test_folder_has_the_tables_only_and_counts_other_objects(tmp_path: Path) -> None:
    storage, folder = Storage(), str(tmp_path)
    write_images(storage, folder, 2)
    for name in ("a/t.txt", "a/month=1/t.txt", "_hidden.csv", "notes.md"):
        storage.write(f"{folder}/{name}", b"../images/0.jpg")
    found = listing(storage, folder)
    assert [shard.uri for shard in found] == [
        f"{folder}/a/{name}/rows-000000000000" for name in ("month=1/t.txt", "t.txt")
    ]
    assert found.ignored == {IgnoreReason.HIDDEN: 1, IgnoreReason.FORMAT: 3}
    # Paths are relative to the folder that has the Hive partitions.
    assert all(sample.error is None for sample in samples(storage, folder))


@pytest.mark.parametrize("table", ["data/t.parquet", "z.csv", "z.jsonl"])
def test_json_and_text_next_to_other_tables_are_ignored(table: str, tmp_path: Path) -> None:
    storage, folder = Storage(), str(tmp_path)
    storage.write(f"{folder}/{table}", FILES[f"t{Path(table).suffix}"])
    notes = ("dataset_info.json", "data/stats.json.gz", "LICENSE.txt")
    for name in notes:
        storage.write(f"{folder}/{name}", b'{"uri": "images/0.jpg"}')
    found = listing(storage, folder, label_column="label")
    assert [shard.images for shard in found] == [12]
    assert found.ignored == {IgnoreReason.FORMAT: 3}
    named = listing(storage, [f"{folder}/{name}" for name in ("LICENSE.txt", table)], uri_column="uri")
    assert [shard.images for shard in named] == [1, 12]
    # Each folder of the input has its own tables.
    storage.write(f"{folder}/other/part-0.json", FILES["part-0.json"])
    both = listing(storage, [f"{folder}/{table}", f"{folder}/other/*.json"])
    assert [shard.images for shard in both] == [12, 12]


@pytest.mark.parametrize("content", [FILES["t.jsonl"], FILES["t.parquet"], FILES["t.txt"]])
def test_table_that_the_input_names_may_have_any_name(content: bytes, tmp_path: Path) -> None:
    storage = Storage()
    write_images(storage, str(tmp_path))
    storage.write(f"{tmp_path}/list", content)
    assert len(samples(storage, f"{tmp_path}/list")) == 12


@pytest.mark.parametrize("content", [b'[{"uri": "a.jpg"}]', b'{\n  "uri": "a.jpg"\n}', b"text"])
def test_other_json_than_json_lines_is_refused(content: bytes, tmp_path: Path) -> None:
    Storage().write(f"{tmp_path}/list.json", content)
    with pytest.raises(
        StorageError, match=r"list\.json: .* not a JSON object .*; write JSON Lines, or exclude"
    ):
        list(listing(Storage(), str(tmp_path)))


def test_csv_without_a_header_has_configured_columns(tmp_path: Path) -> None:
    storage = Storage()
    storage.write(f"{tmp_path}/a.csv", as_csv(ROWS, header=False))
    found = samples(
        storage,
        str(tmp_path),
        csv_columns=["id", "uri", "label", "split"],
        key_column="id",
        label_column="label",
    )
    assert [(x.key, x.uri) for x in found] == [(str(i), f"{tmp_path}/images/{i}.jpg") for i in range(12)]
    storage.write(f"{tmp_path}/a.csv", b"a;1.jpg\nb;2.jpg")
    assert [x.key for x in samples(storage, str(tmp_path), csv_columns=["uri"])] == ["a;1.jpg", "b;2.jpg"]


@pytest.mark.parametrize("start", [b"s3://b/", b"http://h/", b"/data/", b"a/", b""])
@pytest.mark.parametrize("columns", [["uri"], ["label", "uri"], [*ROWS[0]]])
@pytest.mark.parametrize("name", [None, "url"])
def test_error_of_a_csv_without_a_header_names_the_setting(
    start: bytes, columns: list[str], name: str | None, tmp_path: Path
) -> None:
    rows = [{column: row[column] for column in columns} for row in ROWS]
    Storage().write(f"{tmp_path}/a.csv", as_csv(rows, header=False).replace(b"images/", start))
    with pytest.raises(ConfigError, match=r"uri_column: .*a\.csv.*not a header: set input\.csv_columns"):
        list(listing(Storage(), str(tmp_path), uri_column=name))


def test_column_of_parquet_may_have_the_name_of_a_path(tmp_path: Path) -> None:
    Storage().write(f"{tmp_path}/a.parquet", make_parquet({"image/path": ["a.jpg"]}))
    assert [x.key for x in samples(Storage(), str(tmp_path))] == ["a.jpg"]


def test_types_of_json_lines_are_those_of_all_rows(tmp_path: Path) -> None:
    lines = as_json([{"uri": "a.jpg", "label": None}] * 2000 + [{"uri": "b.jpg", "label": "x"}])
    Storage().write(f"{tmp_path}/a.jsonl", lines)
    first, *_, last = samples(Storage(), str(tmp_path), carry=["label"])
    assert (first.carried[0].as_py(), last.carried[0].as_py()) == (None, "x")


def test_keys_labels_and_carried_values_come_from_columns(tmp_path: Path) -> None:
    storage = Storage()
    write_images(storage, str(tmp_path))
    for name in ("t.jsonl", "t.parquet"):
        storage.write(f"{tmp_path}/{name}", FILES[name])
        fields: Any = {"key_column": "id", "label_column": "label", "carry": {"split": None, "id": "int32"}}
        found = samples(storage, f"{tmp_path}/{name}", **fields)
        assert [(x.key, x.label) for x in found] == [(str(i), i % 3) for i in range(12)]
        carried = [tuple(value.as_py() for value in x.carried) for x in found]
        assert carried == [(row["split"], row["id"]) for row in ROWS]
    text = samples(storage, f"{tmp_path}/t.parquet", label_column="label", labels=False)
    assert {x.label for x in text} == {None}


def test_leading_zeros_of_csv_values_are_kept(tmp_path: Path) -> None:
    storage = Storage()
    storage.write(f"{tmp_path}/a.csv", b"uri,id\na.jpg,007\n")
    assert [x.key for x in samples(storage, str(tmp_path), key_column="id")] == ["007"]


def test_class_names_of_hugging_face_reach_the_samples(tmp_path: Path) -> None:
    storage = Storage()
    feature = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": feature}})}
    storage.write(f"{tmp_path}/a.parquet", make_parquet({"url": ["a.jpg"], "label": [1]}, metadata))
    [shard] = listing(storage, str(tmp_path), label_column="label")
    [sample] = list_samples(shard)
    assert (sample.label, sample.label_names) == (1, ["cat", "dog"])


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ([["split", "=", "train"]], [0, 4, 8]),
        ([["split", "!=", "train"], ["id", "<", 4]], [1, 2, 3]),
        ([["id", "in", [1, 11]]], [1, 11]),
        ([["id", "not in", [*range(10)]]], [10, 11]),
    ],
)
def test_filter_selects_rows(name: str, condition: list[list[Any]], kept: list[int], tmp_path: Path) -> None:
    storage = Storage()
    storage.write(f"{tmp_path}/{name}", FILES[name])
    found = samples(storage, f"{tmp_path}/{name}", filter=condition)
    assert [sample.key for sample in found] == [f"images/{i}.jpg" for i in kept]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.decimal128(5, 2)])
def test_filter_compares_numbers(kind: pa.DataType, tmp_path: Path) -> None:
    storage, values = Storage(), pa.array(["9", "10", "11"]).cast(kind)
    storage.write(f"{tmp_path}/a.parquet", make_parquet({"uri": ["9", "10", "11"], "n": values}))
    for condition in (["n", ">", 9.5], ["n", ">=", 10], ["n", "in", [10, 11]]):
        assert [sample.key for sample in samples(storage, str(tmp_path), filter=[condition])] == ["10", "11"]


def test_uri_column_may_be_a_struct_with_a_path(tmp_path: Path) -> None:
    write_images(Storage(), str(tmp_path), 2)
    column = [{"bytes": None, "path": "images/0.jpg"}, {"bytes": None, "path": None}, None]
    Storage().write(f"{tmp_path}/t.parquet", make_parquet({"image": column}))
    found, *missing = samples(Storage(), str(tmp_path), uri_column="image")
    assert (found.image, found.key) == (make_image(0), "images/0.jpg")
    assert [category_of(x.error) for x in missing] == [ErrorCategory.NO_IMAGE] * 2


def test_column_with_image_bytes_names_the_format_to_set(tmp_path: Path) -> None:
    column = [{"bytes": make_image(1), "path": "1.jpg"}]
    Storage().write(f"{tmp_path}/t.parquet", make_parquet({"image": column, "label": [1]}))
    for name in (None, "image"):
        with pytest.raises(ConfigError, match=r"t\.parquet.* (bytes of images|image bytes).* set .*parquet"):
            list(listing(Storage(), str(tmp_path), uri_column=name))


def test_filter_compares_times(tmp_path: Path) -> None:
    storage = Storage()
    times = pa.array([datetime.datetime(2026, 1, day, tzinfo=datetime.UTC) for day in (1, 2, 3)])
    storage.write(f"{tmp_path}/a.parquet", make_parquet({"uri": ["1", "2", "3"], "at": times}))
    for value in ("2026-01-02T00:00:00Z", datetime.date(2026, 1, 2)):
        found = samples(storage, str(tmp_path), filter=[["at", ">", value]])
        assert [sample.key for sample in found] == ["3"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"uri_column": "uir"}, r"input.uri_column: .*t.parquet has no column 'uir'; columns: id \(int64\)"),
        ({"key_column": "x"}, "input.key_column: .*no column 'x'"),
        ({"label_column": "x"}, "input.label_column: .*no column 'x'"),
        ({"filter": [["x", "=", 1]]}, "input.filter: .*no column 'x'"),
        (
            {"filter": [["id", "=", "a"]]},
            r"input.filter: \[id, =, 'a'\] does not fit the column 'id' \(int64\)",
        ),
    ],
)
def test_error_names_the_field_and_the_column(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    Storage().write(f"{tmp_path}/t.parquet", FILES["t.parquet"])
    with pytest.raises(ConfigError, match=message):
        list(listing(Storage(), str(tmp_path), **fields))


@pytest.mark.parametrize(
    ("names", "found"),
    [(["id", "URL"], "URL"), (["anything"], "anything"), (["uri", "url"], None), (["a", "b"], None)],
)
def test_uri_column_is_the_only_one_with_a_usual_name(
    names: list[str], found: str | None, tmp_path: Path
) -> None:
    Storage().write(f"{tmp_path}/t.csv", as_csv([dict.fromkeys(names, "x.jpg")]))
    if found is not None:
        assert [sample.key for sample in samples(Storage(), str(tmp_path))] == ["x.jpg"]
    else:
        with pytest.raises(ConfigError, match=f"input.uri_column: set the column .*{names[0]}"):
            list(listing(Storage(), str(tmp_path)))


BAD_URIS: list[tuple[str | None, ErrorCategory]] = [
    (None, ErrorCategory.NO_IMAGE),
    ("  ", ErrorCategory.NO_IMAGE),
    ("ftp://host/a.jpg", ErrorCategory.INVALID_URI),
    ("http:///a.jpg", ErrorCategory.INVALID_URI),
    ("http://host:99999/a.jpg", ErrorCategory.INVALID_URI),
    ("http://user:secret@host/a.jpg", ErrorCategory.INVALID_URI),
    ("s3://bucket", ErrorCategory.INVALID_URI),
    ("s3:/bucket/a.jpg", ErrorCategory.INVALID_URI),
    ("s3://buck et/a.jpg", ErrorCategory.INVALID_URI),
    ("s3://bucket/" + "k" * 1025, ErrorCategory.INVALID_URI),
    ("data:image/png;base64,AAAA", ErrorCategory.INVALID_URI),
    ("a\0.jpg", ErrorCategory.INVALID_URI),
    ("missing.jpg", ErrorCategory.IMAGE_NOT_FOUND),
    ("x" * 3000, ErrorCategory.DOWNLOAD_FAILED),
]


def test_bad_uris_are_error_rows(tmp_path: Path) -> None:
    storage = Storage()
    write_images(storage, str(tmp_path), 1)
    uris = ["images/0.jpg", *(uri for uri, _ in BAD_URIS)]
    storage.write(f"{tmp_path}/a.parquet", make_parquet({"uri": pa.array(uris, pa.string())}))
    first, *bad = samples(storage, str(tmp_path))
    assert first.image == make_image(0)
    assert [category_of(sample.error) for sample in bad] == [category for _, category in BAD_URIS]
    assert "secret" not in str([sample.error for sample in bad])
    schemes = [x.key for x in bad if "s3://, gs://, http(s)://, file:// and paths are supp" in str(x.error)]
    assert schemes == ["ftp://host/a.jpg", "s3:/bucket/a.jpg", "data:image/png;base64,AAAA", "a\0.jpg"]


def test_every_spelling_of_a_local_path_names_the_image(tmp_path: Path) -> None:
    write_images(Storage(), str(tmp_path), 1)
    starts = ("", "file:", "file://", "file://localhost", "FILE://")
    Storage().write(f"{tmp_path}/a.txt", "\n".join(f"{x}{tmp_path}/images/0.jpg" for x in starts).encode())
    found = samples(Storage(), str(tmp_path))
    assert [(x.uri, x.image) for x in found] == [(f"{tmp_path}/images/0.jpg", make_image(0))] * 5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"PAR1 damaged"),
        ("a.csv.gz", gzip.compress(b"uri\n" * 99, mtime=0)[:-9]),
        ("a.csv", b"uri,split\na.jpg,x\nb.jpg,x,1\n"),
        ("a.jsonl", b'["a.jpg"]'),
        ("b.jsonl", b'{"uri":"a.jpg"}\n{"uri"\n'),
        ("c.jsonl", b'{"uri":' + b"[" * 400_000 + b"]" * 400_000 + b"}"),
    ],
)
def test_damaged_table_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    Storage().write(f"{tmp_path}/{name}", content)
    with pytest.raises(StorageError, match=name):
        list(listing(Storage(), str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.csv", b"uri,n\na.jpg,1,2\n", None, "Row #2: .* got 3: .*correct the line"),
        ("a.csv", b"a.jpg,1\n", ["uri"], "input.csv_columns to the names of all columns"),
        ("a.csv", b"uri,n\n\xe4.jpg,1\n", None, "convert the file to UTF-8"),
        ("a.jsonl", b'{"uri":"a.jpg","n":1}\n{"uri":"b.jpg","n":"x"}', None, "column 'n' must have one type"),
    ],
)
def test_error_of_a_text_table_has_a_remedy(
    name: str, content: bytes, columns: list[str] | None, message: str, tmp_path: Path
) -> None:
    Storage().write(f"{tmp_path}/{name}", content)
    carry = [] if columns else ["n"]
    with pytest.raises(StorageError, match=message):
        list(listing(Storage(), str(tmp_path), csv_columns=columns, carry=carry))


def test_table_without_rows_has_no_shards(tmp_path: Path) -> None:
    storage = Storage()
    files = {"a.csv": b"uri\n", "c.parquet": make_parquet({"uri": []}), "d.csv.gz": gzip.compress(b"")}
    for name, content in (files | {"b.tsv": b"", "e.jsonl": b"\n"}).items():
        storage.write(f"{tmp_path}/{name}", content)
    with pytest.raises(NoShardsError, match=r"expected rows that input\.filter selects in \.parquet"):
        listing(storage, str(tmp_path)).require_shards("input.uri")


# Shards -----------------------------------------------------------------------------------------


def many(count: int, **changed: str) -> bytes:
    return "".join(changed.get(f"r{i}", f"http://127.0.0.1:1/{i}.jpg") + "\n" for i in range(count)).encode()


def shards_of(tmp_path: Path, content: bytes, **fields: Any) -> dict[str, Shard]:
    Storage().write(f"{tmp_path}/t.txt", content)
    return {
        shard.uri.rpartition("/")[2]: shard for shard in listing(Storage(), f"{tmp_path}/t.txt", **fields)
    }


def test_shards_have_1000_rows_and_change_with_their_rows(tmp_path: Path) -> None:
    before = shards_of(tmp_path, many(2500))
    assert [*before] == ["rows-000000000000", "rows-000000001000", "rows-000000002000"]
    assert [deserialize_table(shard.rows).num_rows for shard in before.values()] == [1000, 1000, 500]
    assert shards_of(tmp_path, many(2500)) == before
    appended = shards_of(tmp_path, many(2600))
    assert [name for name in before if appended[name] != before[name]] == ["rows-000000002000"]
    replaced = shards_of(tmp_path, many(2500, r1500="http://127.0.0.1:1/other.jpg"))
    assert [name for name in before if replaced[name] != before[name]] == ["rows-000000001000"]


def test_version_of_a_shard_covers_labels_keys_and_carried_values(tmp_path: Path) -> None:
    versions = set()
    times = pa.array([1, 2], pa.timestamp("ns", "Not/AZone"))
    dates = pa.array([2**30, 1], pa.date32())  # Python has no such year
    columns: dict[str, Any] = {
        "uri": ["a", "b"],
        "key": ["1", "2"],
        "label": [0, 1],
        "at": times,
        "on": dates,
        "other": [1, 1],
    }
    changes: list[dict[str, Any]] = [{}, {"key": ["1", "3"]}, {"label": [0, 0]}, {"at": times[::-1]}]
    for change in (*changes, {"on": dates[::-1]}, {"other": [2, 2]}):
        Storage().write(f"{tmp_path}/t.parquet", make_parquet({**columns, **change}))
        fields = {"key_column": "key", "label_column": "label", "carry": ["at", "on"]}
        [shard] = listing(Storage(), str(tmp_path), **fields)
        versions.add(shard.version)
    assert len(versions) == 5  # `other` is not used


def test_shards_do_not_depend_on_row_groups_and_filters(tmp_path: Path) -> None:
    uris, numbers = [f"http://h/{i}" for i in range(2500)], [*range(2500)]
    names = []
    for size in (300, 5000):
        content = make_parquet({"uri": uris, "n": numbers}, row_group_size=size)
        Storage().write(f"{tmp_path}/t.parquet", content)
        found = [
            *listing(Storage(), str(tmp_path)),
            *listing(Storage(), str(tmp_path), filter=[["n", ">", 1500]]),
        ]
        names.append([(shard.uri, shard.version) for shard in found])
    assert names[0] == names[1]
    assert [uri[-4:] for uri, _ in names[0]] == ["0000", "1000", "2000", "1000", "2000"]


def test_selected_rows_are_read_alone(tmp_path: Path) -> None:
    storage = Storage()
    write_images(storage, str(tmp_path))
    storage.write(f"{tmp_path}/t.csv", FILES["t.csv"])
    [shard] = listing(storage, str(tmp_path), key_column="id")
    part = select_images(shard, [3, 7])
    assert part == select_rows(shard, [3, 7])
    assert (part.uri, part.version) == (shard.uri, shard.version)
    assert [x.key for x in list_samples(part)] == ["3", "7"]
    assert [x.image for x in read_samples(storage, part, ReadOptions())] == [make_image(3), make_image(7)]


# Versions of objects ------------------------------------------------------------------------------


class CountingStorage(Storage):
    """Storage that counts listings and lookups, and the objects that listings have yielded."""

    def __init__(self, endpoint_url: str | None = None) -> None:
        super().__init__(endpoint_url)
        object.__setattr__(self, "listed", [])
        object.__setattr__(self, "looked_up", [])

    def list(self, uri: str, missing_ok: bool = True, prefix: str = "") -> Iterator[Any]:
        for info in super().list(uri, missing_ok, prefix):
            self.listed.append(info.uri)  # type: ignore[attr-defined]
            yield info

    def stat(self, uri: str) -> Any:
        self.looked_up.append(uri)  # type: ignore[attr-defined]
        return super().stat(uri)


def test_versions_come_from_one_listing_of_a_folder(storage: Storage, bucket: str) -> None:
    write_images(storage, bucket)
    counting = CountingStorage(storage.endpoint_url)
    uris = [f"{bucket}/images/{i}.jpg" for i in range(12)]
    found = find_versions(counting, [*uris, f"{bucket}/images/none.jpg"], "auto")
    assert found == {uri: storage.version(uri) for uri in uris} | {f"{bucket}/images/none.jpg": ABSENT}
    assert len(counting.listed) == 12  # type: ignore[attr-defined]
    assert counting.looked_up == []  # type: ignore[attr-defined]


def test_folder_with_many_other_objects_is_listed_in_part(
    storage: Storage, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.read.tables._LISTED", 0)
    write_images(storage, bucket)
    for i in range(30):
        storage.write(f"{bucket}/images/0-{i}.jpg", b"other")
    counting = CountingStorage(storage.endpoint_url)
    uris = [f"{bucket}/images/0-0.jpg", f"{bucket}/images/9.jpg"]
    found = find_versions(counting, [*uris, f"{bucket}/images/none.jpg"], "auto")
    assert found == {uri: storage.version(uri) for uri in uris} | {f"{bucket}/images/none.jpg": ABSENT}
    assert len(counting.listed) == 30  # type: ignore[attr-defined]
    assert len(counting.looked_up) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "uris",
    [
        ["s3://no-such-bucket-16/a.jpg"],
        ["s3://no-such-bucket-16/a.jpg", "s3://no-such-bucket-16/b.jpg"],
        ["file.txt/a.jpg"],
        ["file.txt/a.jpg", "file.txt/b.jpg"],
        ["x" * 3000 + "/a.jpg", "x" * 3000 + "/b.jpg"],
    ],
)
def test_place_of_an_image_that_does_not_exist_is_an_error_row(
    uris: list[str], storage: Storage, tmp_path: Path
) -> None:
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "t.csv").write_text("uri\n" + "\n".join(uris))
    found = samples(storage, f"{tmp_path}/t.csv")
    assert len(found) == len(uris)
    assert {category_of(x.error) for x in found} <= {
        ErrorCategory.IMAGE_NOT_FOUND,
        ErrorCategory.DOWNLOAD_FAILED,
    }


def test_bucket_that_fails_stops_the_plan_and_names_the_remedy(
    s3_server: LocalS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.retrying.MAX_PAUSE_S", 0.01)
    with FaultProxy(s3_server.endpoint_url) as proxy:
        proxy.always("error")
        for uris in ([f"{bucket}/a.jpg"], [f"{bucket}/a.jpg", f"{bucket}/b.jpg"]):
            with pytest.raises(StorageError, match=r"(?i)internal.*input\.check_objects: never"):
                find_versions(Storage(endpoint_url=proxy.url), uris, "auto")


def test_rows_are_read_where_listing_is_denied(
    s3_server: LocalS3, storage: Storage, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.retrying.MAX_PAUSE_S", 0.01)
    infos = [storage.write(f"{bucket}/{i}.jpg", make_image(i)) for i in range(3)]
    with FaultProxy(s3_server.endpoint_url) as proxy:
        proxy.always("denied", lambda request: "list-type" in str(request))
        assert find_versions(Storage(endpoint_url=proxy.url), [info.uri for info in infos], "auto") == {}


def test_replaced_object_changes_the_shard(storage: Storage, bucket: str) -> None:
    write_images(storage, bucket)
    storage.write(f"{bucket}/t.csv", FILES["t.csv"])
    before = {check: [*listing(storage, bucket, check_objects=check)] for check in ("auto", "never")}
    storage.write(f"{bucket}/images/5.jpg", make_image(50))
    after = {check: [*listing(storage, bucket, check_objects=check)] for check in ("auto", "never")}
    assert before["never"] == after["never"]
    assert before["auto"] != after["auto"]
    # The version that was planned is read, or none.
    errors = [x.error for x in read_samples(storage, before["auto"][0], ReadOptions())]
    assert [category_of(error) for error in errors if error] == [ErrorCategory.IMAGE_CHANGED]
    assert not any(x.error for x in read_samples(storage, before["never"][0], ReadOptions()))


def test_web_servers_are_asked_for_versions_only_on_request(tmp_path: Path) -> None:
    with HttpServer() as server:
        uri = server.add("/a.jpg", Answer(make_image(1), headers={"ETag": '"one"'}))
        (tmp_path / "t.txt").write_text(uri)
        [auto] = listing(Storage(), str(tmp_path))
        assert server.requests == []
        [always] = listing(Storage(), str(tmp_path), check_objects="always")
        assert [request.method for request in server.requests] == ["HEAD"]
        assert deserialize_table(auto.rows)["version"].to_pylist() == [None]
        size = len(make_image(1))
        assert deserialize_table(always.rows)["version"].to_pylist() == [f"one-{size}"]
        [sample] = read_samples(Storage(), always, ReadOptions())
        assert (sample.image, sample.version) == (make_image(1), f"one-{size}")
        server.add("/a.jpg", Answer(make_image(2), headers={"ETag": '"two"'}))
        [sample] = read_samples(Storage(), always, ReadOptions())
        assert category_of(sample.error) is ErrorCategory.IMAGE_CHANGED


# Snapshots ----------------------------------------------------------------------------------------


def write_delta(storage: Storage, uri: str) -> Any:
    """Appends twice and deletes the rows of label 2, which leaves files that are not in the table."""
    deltalake = pytest.importorskip("deltalake")
    options = storage.object_store_options(uri)
    for part in (TABLE.slice(0, 6), TABLE.slice(6)):
        deltalake.write_deltalake(uri, part, mode="append", partition_by=["split"], storage_options=options)
    table = deltalake.DeltaTable(uri, storage_options=options)
    table.delete("label = 2")
    return table


@pytest.mark.parametrize("place", ["local", "s3"])
def test_delta_table_is_read_at_its_current_snapshot(
    place: str, storage: Storage, bucket: str, tmp_path: Path
) -> None:
    uri = f"{tmp_path if place == 'local' else bucket}/table"
    write_delta(storage, uri)
    write_images(storage, uri)
    found = samples(storage, uri, key_column="id", label_column="label", carry=["split"])
    kept = [row for row in ROWS if row["label"] != 2]
    rows = sorted((int(x.key), x.label, x.carried[0].as_py(), x.error) for x in found)
    assert rows == [(row["id"], row["label"], row["split"], None) for row in kept]
    live = snapshot_files(storage, uri)
    assert {shard.uri.rpartition("/")[0] for shard in listing(storage, uri)} == {info.uri for info in live}
    assert live == [storage.stat(info.uri) for info in live]
    assert len(live) < len([info for info in storage.list(uri) if info.uri.endswith(".parquet")])
    assert [x.key for x in samples(storage, uri, key_column="id", filter=[["split", "=", "train"]])] != []


def test_delta_table_with_mapped_columns_is_refused(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    deltalake.write_deltalake(f"{tmp_path}/t", TABLE)
    log = tmp_path / "t/_delta_log/00000000000000000000.json"
    log.write_text(
        log.read_text().replace('"configuration":{', '"configuration":{"delta.columnMapping.mode":"name"')
    )
    with pytest.raises(StorageError, match=r"features that are not supported: columnMapping; rewrite"):
        list(listing(Storage(), f"{tmp_path}/t"))


def write_iceberg(storage: Storage, uri: str, tmp_path: Path) -> Any:
    pytest.importorskip("pyiceberg")
    from pyiceberg.catalog.memory import InMemoryCatalog

    options = storage.object_store_options(uri.removeprefix("file://"))
    keys = {"s3.endpoint": "endpoint_url", "s3.region": "region"}
    keys |= {"s3.access-key-id": "aws_access_key_id", "s3.secret-access-key": "aws_secret_access_key"}
    properties = {name: options[other] for name, other in keys.items() if other in options}
    catalog = InMemoryCatalog("test", warehouse=str(tmp_path), **properties)
    catalog.create_namespace("a")
    table = catalog.create_table("a.t", TABLE.schema, location=uri)
    table.append(TABLE.slice(0, 6))
    table.append(TABLE.slice(6))
    table.delete("label = 2")
    return table


@pytest.mark.parametrize("place", ["local", "s3"])
def test_iceberg_table_is_read_at_its_newest_metadata(
    place: str, storage: Storage, bucket: str, tmp_path: Path
) -> None:
    uri = f"{tmp_path if place == 'local' else bucket}/table"
    table = write_iceberg(storage, uri if place == "s3" else f"file://{uri}", tmp_path)
    write_images(storage, uri)
    with table.update_schema() as update:
        update.rename_column("uri", "image_url")
    current = table.metadata_location.removeprefix("file://")
    for name in (uri, current):
        found = samples(storage, name, key_column="id", label_column="label")
        rows = sorted((int(x.key), x.label, x.error) for x in found)
        assert rows == [(row["id"], row["label"], None) for row in ROWS if row["label"] != 2]
    live = snapshot_files(storage, uri)
    assert {shard.uri.rpartition("/")[0] for shard in listing(storage, uri)} == {info.uri for info in live}
    # A commit that another writer lost leaves a second file of the same version.
    lost = current.rpartition("/")[0] + f"/{current.rpartition('/')[2][:5]}-lost.metadata.json"
    storage.write(lost, storage.read(current))
    with pytest.raises(StorageError, match=r"has 2 metadata files: .*lost.*set input.uri to"):
        list(listing(storage, uri))
    assert len(samples(storage, current)) == 8


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Storage().write(f"{tmp_path}/delta/_delta_log/00000000000000000000.json", b"{}")
    Storage().write(f"{tmp_path}/iceberg/metadata/v1.metadata.json", b"{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for extra in ("delta", "iceberg"):
        with pytest.raises(StorageError, match=rf"cvt-label\[{extra}\]"):
            list(listing(Storage(), f"{tmp_path}/{extra}"))


@pytest.mark.parametrize("name", ["_delta_log/00000000000000000000.json", "metadata/v1.metadata.json"])
def test_damaged_snapshot_is_reported(name: str, tmp_path: Path) -> None:
    pytest.importorskip("deltalake")
    pytest.importorskip("pyiceberg")
    Storage().write(f"{tmp_path}/{name}", b"{damaged")
    with pytest.raises(StorageError, match=r"the (Delta|Iceberg) table cannot be read"):
        list(listing(Storage(), str(tmp_path)))


def test_table_without_rows_is_named(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    deltalake.write_deltalake(f"{tmp_path}/delta", TABLE.slice(0, 0))
    iceberg = write_iceberg(Storage(), f"file://{tmp_path}/iceberg", tmp_path)
    iceberg.delete("id >= 0")
    for name in ("delta", "iceberg"):
        with pytest.raises(NoShardsError, match=rf"the table has no rows: {tmp_path}/{name}"):
            listing(Storage(), f"{tmp_path}/{name}").require_shards("input.uri")


# S3 Inventory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["CSV", "Parquet"])
def test_s3_inventory_gives_objects_and_their_versions(format: str, storage: Storage, bucket: str) -> None:
    keys = ["a b+c/1%20.jpg", "größe/2.PNG", "3.txt", "old.jpg", "gone.jpg", "4.jpg"]
    infos = [storage.write(f"{bucket}/in/{key}", make_image(i)) for i, key in enumerate(keys)]
    tags = [info.version.rpartition("-")[0] for info in infos]
    name = bucket.removeprefix("s3://")
    latest, deleted = [key != "old.jpg" for key in keys], [key == "gone.jpg" for key in keys]
    if format == "CSV":
        from urllib.parse import quote_plus

        columns = "Bucket, Key, IsLatest, IsDeleteMarker, Size, ETag"
        lines = zip(keys, latest, deleted, infos, tags, strict=True)
        text = "".join(
            f'"{name}","{quote_plus(f"in/{key}", safe="/")}","{str(live).lower()}","{str(dead).lower()}",'
            f'"{info.size}","{tag}"\n'
            for key, live, dead, info, tag in lines
        )
        content, data = gzip.compress(text.encode()), "data/x.csv.gz"
    else:
        columns = "message s3.inventory {}"
        table = {"bucket": [name] * 6, "key": [f"in/{key}" for key in keys], "is_latest": latest}
        table |= {"is_delete_marker": deleted, "size": [info.size for info in infos], "e_tag": tags}
        content, data = make_parquet(table), "data/x.parquet"
    manifest = {"sourceBucket": name, "destinationBucket": f"arn:aws:s3:::{name}", "fileFormat": format}
    manifest |= {"fileSchema": columns, "files": [{"key": f"inventory/{data}", "size": len(content)}]}
    storage.write(f"{bucket}/inventory/{data}", content)
    storage.write(f"{bucket}/inventory/{data}.leftover.csv", b"a,b\n")
    uri = storage.write(f"{bucket}/inventory/2026/manifest.json", json.dumps(manifest).encode()).uri
    counting = CountingStorage(storage.endpoint_url)
    found = listing(counting, uri)
    [shard] = found
    assert found.ignored == {IgnoreReason.FORMAT: 1, IgnoreReason.OLD_VERSION: 2}
    assert not any("/in/" in name for name in counting.listed)  # type: ignore[attr-defined]
    read = list(read_samples(storage, shard, ReadOptions()))
    assert [(x.uri, x.version, x.error) for x in read] == [
        (infos[i].uri, infos[i].version, None) for i in (0, 1, 5)
    ]


def test_folder_of_inventories_names_the_manifest_to_set(tmp_path: Path) -> None:
    storage, uri = Storage(), f"{tmp_path}/2026-11-30T01-00Z/manifest.json"
    storage.write(uri, b"{}")
    storage.write(f"{tmp_path}/data/1.csv", b'"bucket","1.jpg"')
    with pytest.raises(ConfigError, match=rf"input\.uri: {uri} .* S3 Inventory: set input\.uri"):
        list(listing(storage, str(tmp_path)))
    with pytest.raises(NoShardsError, match=r"S3 Inventory, set input\.uri to its manifest\.json"):
        list_shards(storage, InputConfig(uri=str(tmp_path))).require_shards("input.uri")


def test_metadata_of_an_iceberg_table_in_a_subfolder_is_no_table(tmp_path: Path) -> None:
    for number in (1, 2):
        Storage().write(f"{tmp_path}/t/metadata/v{number}.metadata.json", b'{"uri": "a.jpg"}')
    with pytest.raises(ConfigError, match=r"v1\.metadata\.json .* Iceberg .*: set input\.uri"):
        list(listing(Storage(), str(tmp_path)))


def test_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    manifest = {"destinationBucket": "arn:aws:s3:::b", "fileFormat": "ORC", "fileSchema": "x", "files": []}
    for content, cause in ((json.dumps(manifest), "format ORC"), ("{}", "manifest of an S3 Inventory")):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(StorageError, match=cause):
            list(listing(Storage(), f"{tmp_path}/manifest.json"))
