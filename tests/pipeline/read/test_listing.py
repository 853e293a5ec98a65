"""Listing of inputs: lists, glob patterns, exclusions, stated formats, and tables."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import ConfigError, InputFormat
from pipeline.read import IgnoreReason, NoShardsError, ShardListing
from pipeline.storage import ObjectInfo, Storage
from tests.cases import case_input
from tests.makers import list_shards


def write(storage: Storage, root: str, *names: str) -> None:
    for name in names:
        storage.write(f"{root}/{name}", b"x")


def listed(storage: Storage, root: str, *uris: str, exclude: tuple[str, ...] = ()) -> ShardListing:
    return list_shards(storage, [f"{root}/{uri}".rstrip("/") for uri in uris], exclude=[*exclude])


def names(listing: ShardListing, root: str) -> list[str]:
    return [shard.uri.removeprefix(f"{root}/") for shard in listing]


class CountingStorage(Storage):
    """Storage that records what is listed."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "requested", [])

    def list(self, uri: str, missing_ok: bool = True, prefix: str = "") -> Iterator[ObjectInfo]:
        self.requested.append((uri, prefix))  # type: ignore[attr-defined]
        return super().list(uri, missing_ok, prefix)


# Lists and patterns ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uris", "found"),
    [
        (["a"], ["a/1.tar", "a/b/2.tar"]),
        (["a/*.tar"], ["a/1.tar"]),
        (["**/*.tar"], ["a/1.tar", "a/b/2.tar", "c-3.tar", "c-4.tar"]),
        (["c-*"], ["c-3.tar", "c-4.tar", "c-5.parquet"]),
        (["c-[4-5]*"], ["c-4.tar", "c-5.parquet"]),
        (["c-{3..5}.{tar,parquet}", "a"], []),
        (["c-{3..4}.tar", "a/b"], ["a/b/2.tar", "c-3.tar", "c-4.tar"]),
        (["{a,c-5.parquet}"], ["a/1.tar", "a/b/2.tar", "c-5.parquet"]),
        (["a", "a/b", "a/1.tar", "a/*"], ["a/1.tar", "a/b/2.tar"]),
        (["", "c-*.tar"], ["a/1.tar", "a/b/2.tar", "c-3.tar", "c-4.tar", "c-5.parquet"]),
    ],
)
def test_uris_and_patterns_list_each_shard_once_in_order(
    storage: Storage, bucket: str, uris: list[str], found: list[str]
) -> None:
    write(storage, bucket, "a/1.tar", "a/b/2.tar", "c-3.tar", "c-4.tar", "c-5.parquet", "readme.txt")
    if found:
        for order in (uris, uris[::-1]):
            assert names(listed(storage, bucket, *order).require_shards("input.uri"), bucket) == found
        return
    with pytest.raises(NoShardsError, match=r"3 of 7 URIs have no object: .*c-3.parquet, .*c-4.parquet"):
        list(listed(storage, bucket, *uris).require_shards("input.uri"))


def test_missing_objects_of_braces_are_counted_and_named(storage: Storage, bucket: str) -> None:
    write(storage, bucket, *(f"train-{i:04d}.tar" for i in range(200) if i % 50))
    listing = listed(storage, bucket, "train-{0000..0199}.tar").require_shards("train.uri")
    message = (
        rf"train.uri: 4 of 200 URIs have no object: {bucket}/train-0000.tar, .*0050.tar, .*0100.tar, \.\.\."
    )
    with pytest.raises(NoShardsError, match=message):
        list(listing)


@pytest.mark.parametrize("uri", ["*.tra", "none/**/*.tar", "{0..3}.tar", "x[1].tar"])
def test_pattern_without_objects_has_no_shards(storage: Storage, tmp_path: Path, uri: str) -> None:
    write(storage, str(tmp_path), "0.txt", "y.tar")
    with pytest.raises(NoShardsError, match=r"no shards found|4 of 4 URIs have no object"):
        listed(storage, str(tmp_path), uri).require_shards("input.uri")
    with pytest.raises(NoShardsError, match="no object"):
        list(listed(storage, str(tmp_path), "*.tar", uri).require_shards("input.uri"))


def test_name_with_the_characters_of_a_pattern_is_taken_literally(storage: Storage, bucket: str) -> None:
    write(storage, bucket, "x[1].tar", "x1.tar", "a*/b.tar", "ab/c.tar", "{k,l}/m.jpg", "k/n.jpg")
    assert names(listed(storage, bucket, "x[1].tar"), bucket) == ["x[1].tar"]
    assert names(listed(storage, bucket, "a*"), bucket) == ["a*/b.tar"]
    (group,) = listed(storage, bucket, "{k,l}")
    assert [info.uri for info in group.members] == [f"{bucket}/{{k,l}}/m.jpg"]
    storage.delete(f"{bucket}/x[1].tar")
    assert names(listed(storage, bucket, "x[1].tar"), bucket) == ["x1.tar"]


def test_images_of_one_folder_form_groups_together(storage: Storage, bucket: str) -> None:
    images = [f"p/{i:04d}.{'jpg' if i % 2 else 'png'}" for i in range(30)]
    write(storage, bucket, *images, "q/1.jpg", "q/2.gif")
    (group, other) = listed(storage, bucket, "p/*.jpg", "p/*.png", "p/000*", "q/*.jpg", "q/{1,2}.*")
    assert [info.uri for info in group.members] == [f"{bucket}/{name}" for name in images]
    assert re.fullmatch(rf"{bucket}/p/images-0{{16}}-[0-9a-f]{{16}}", group.uri)
    assert [info.uri for info in other.members] == [f"{bucket}/q/1.jpg", f"{bucket}/q/2.gif"]


def test_only_the_prefixes_of_patterns_are_listed(bucket: str) -> None:
    storage = CountingStorage()
    write(storage, bucket, *(f"train-{i:03d}.tar" for i in range(100)), "val.tar", "x/y.tar")
    for uri, prefixes in (
        ("train-{000..099}.tar", ["train-"]),
        ("{x,val.tar}", [""]),
        ("train-00*", ["train-00"]),
    ):
        storage.requested.clear()  # type: ignore[attr-defined]
        assert list(listed(storage, bucket, uri).require_shards("input.uri"))
        listings = [prefix for root, prefix in storage.requested if root == bucket]  # type: ignore[attr-defined]
        assert listings == prefixes


# Exclusions and formats --------------------------------------------------------------------------


def test_excluded_objects_are_counted_and_listed(storage: Storage, bucket: str) -> None:
    write(storage, bucket, "a/1.tar", "a/val/2.tar", "val/3.tar", "val/_x", "b.tar", "c/d.jpg", "c/e.jpg")
    listing = listed(storage, bucket, "", exclude=("val", f"{bucket}/b*", "c/e.jpg"))
    shards = list(listing.require_shards("input.uri"))
    assert [shard.uri for shard in shards] == [f"{bucket}/a/1.tar", f"{bucket}/images-0000000000000000"]
    assert [info.uri for info in shards[1].members] == [f"{bucket}/c/d.jpg"]
    assert listing.ignored == {IgnoreReason.EXCLUDED: 5}
    assert len(listing.ignored_examples[IgnoreReason.EXCLUDED]) == 5
    with pytest.raises(NoShardsError, match=r"\(ignored: 7 objects \(excluded: 7\), ext"):
        listed(storage, bucket, "", exclude=("**",)).require_shards("input.uri")


@pytest.mark.parametrize(
    ("format", "found"),
    [("webdataset", "a.tar"), ("parquet", "b.parquet"), ("images", "images-0000000000000000")],
)
def test_stated_format_lists_only_its_names_and_exact_objects(
    storage: Storage, tmp_path: Path, format: InputFormat, found: str
) -> None:
    root = str(tmp_path)
    write(storage, root, "a.tar", "b.parquet", "c.jpg", "d.txt", "e/shard-1", "e/shard-2")
    assert names(list_shards(storage, root, format), root) == [found]
    (shard,) = list_shards(storage, f"{root}/e/shard-1", format)
    assert shard.format == format
    assert [info.uri for info in shard.members] or shard.uri == f"{root}/e/shard-1"
    exact = list_shards(storage, [f"{root}/e/shard-{{1..2}}", f"{root}/d.txt"], format)
    assert sum(len(shard.members) or 1 for shard in exact) == 3
    with pytest.raises(NoShardsError, match=f"expected .* of the format {format}|expected \\."):
        list_shards(storage, f"{root}/e", format).require_shards("input.uri")


@pytest.mark.parametrize("format", ["auto", "webdataset"])
def test_img2dataset_folder_has_only_its_tars(format: InputFormat) -> None:
    root = str(case_input("img2dataset-folder"))
    listing = list_shards(Storage(), root, format)
    assert names(listing, root) == ["00000.tar", "00001.tar"]
    assert listing.ignored == {IgnoreReason.METADATA: 4}
    with pytest.raises(
        NoShardsError, match=r"metadata of a tar: 4.*, extensions: .*set input\.uri to it, and"
    ):
        list_shards(Storage(), root, "parquet").require_shards("input.uri")


# Tables ------------------------------------------------------------------------------------------

TABLES = [
    ("Delta", ["_delta_log/00000000000000000000.json"]),
    ("Iceberg", ["metadata/00000-aaaa.metadata.json", "metadata/snap-1.avro"]),
    ("Hudi", [".hoodie/hoodie.properties"]),
    ("Lance", ["_versions/1.manifest"]),
]


@pytest.mark.parametrize(("format", "metadata"), TABLES)
@pytest.mark.parametrize("file", ["0.parquet", "zz.parquet", "a=1/x.parquet", "data/k=v/x.parquet"])
def test_nested_table_is_refused_whatever_sorts_before_it(
    storage: Storage, tmp_path: Path, format: str, metadata: list[str], file: str
) -> None:
    root = str(tmp_path)
    file = file.replace(".parquet", ".lance") if format == "Lance" else file
    write(
        storage, root, "a.parquet", "sub/t.x/" + file, *(f"sub/t.x/{name}" for name in metadata), "z.parquet"
    )
    remedy = "set input.uri to the table" if format in ("Delta", "Iceberg") else "write its current rows"
    message = f"{root}/sub/t.x is a table in {format} format.* {remedy}.* input.exclude"
    folder = Path(file).parent.as_posix()
    for uris in (
        [""],
        ["sub"],
        ["**/*"],
        [f"sub/t.x/{file}*"],
        [f"sub/t.x/{file}"],
        [f"sub/t.x/{folder}".removesuffix("/.")],
    ):
        if format in ("Delta", "Iceberg") and uris == ["sub/t.x"]:
            continue  # read as a snapshot
        with pytest.raises(ConfigError, match=message):
            list(listed(storage, root, *uris))
    for uris, exclude in ((["", "z*"], ("t.x",)), (["*.parquet"], ())):
        assert names(listed(storage, root, *uris, exclude=exclude), root) == ["a.parquet", "z.parquet"]
    assert list(list_shards(storage, root, "images")) == []


def test_other_folders_with_the_names_of_metadata_are_no_tables(storage: Storage, tmp_path: Path) -> None:
    root = str(tmp_path)
    write(storage, root, "t/1.parquet", "t/metadata/info.json", "t/_versions/notes.txt", "_delta_log.parquet")
    assert names(list_shards(storage, root), root) == ["t/1.parquet"]


def test_input_that_is_a_delta_table_lists_its_live_files(storage: Storage, bucket: str) -> None:
    folder = case_input("delta-input") / "table"
    for path in folder.rglob("*"):
        if path.is_file():
            storage.write(f"{bucket}/t/{path.relative_to(folder)}", path.read_bytes())
    write(storage, bucket, "u/1.parquet")
    live = "t/part-00000-59e73490-a964-4c7e-940b-51a9bcc5a5b0-c000.zstd.parquet"
    for uris, found in ((["t"], [live]), (["t", "u"], [live, "u/1.parquet"])):
        assert names(listed(storage, bucket, *uris).require_shards("input.uri"), bucket) == found


def test_iceberg_table_lists_its_live_files(tmp_path: Path) -> None:
    pa, catalog = pytest.importorskip("pyarrow"), pytest.importorskip("pyiceberg.catalog.memory")
    memory = catalog.InMemoryCatalog("c", warehouse=f"file://{tmp_path}/in")
    memory.create_namespace("n")
    rows = pa.table({"image": [b"1", b"2"]})
    table = memory.create_table("n.t", schema=rows.schema)
    table.append(rows)
    table.overwrite(rows)
    root = table.location().removeprefix("file://")
    live = [task.file.file_path.removeprefix("file://") for task in table.scan().plan_files()]
    assert len(list(Path(root).rglob("*.parquet"))) == 2
    for old in sorted(Path(root, "metadata").glob("*.metadata.json"))[:-1]:
        shutil.move(old, tmp_path)  # the catalog has the name of the newest one
    assert [shard.uri for shard in list_shards(Storage(), root)] == live
    for part in (f"{root}/data", live[0]):
        for format in ("auto", "table"):
            with pytest.raises(ConfigError, match="is a table in Iceberg format"):
                list(list_shards(Storage(), part, format))
