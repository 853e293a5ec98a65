"""Listing of shards, groups of image files, and names of prediction files."""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from pipeline.config import InputFormat
from pipeline.predictions import is_allowed_path, prediction_path
from pipeline.read import IgnoreReason, Shard, ShardListing
from pipeline.read.shards import TAR_SUFFIXES, file_extension
from pipeline.storage import ObjectInfo, ObjectNotFound, Storage, normalize_uri
from tests.makers import list_shards


class FakeListing(Storage):
    """Storage with a given listing, for tests that need many names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        object.__setattr__(self, "infos", [ObjectInfo(f"s3://b/{n}", 10, f"etag-{n}") for n in names])

    def list(self, uri: str, missing_ok: bool = True, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter(sorted(self.infos, key=lambda info: info.uri.encode()))  # type: ignore[attr-defined]


def write(storage: Storage, root: str, *names: str) -> None:
    for name in names:
        storage.write(f"{root}/{name}", b"x")


def test_extension_determines_the_format_in_any_case(storage: Storage, bucket: str) -> None:
    write(storage, bucket, "a.tar", "b.TAR.GZ", "c.tgz", "d.parquet", "e.txt", "f", "g.jpg.json")
    listing = list_shards(storage, bucket)
    assert [(shard.uri, shard.format) for shard in listing] == [
        (f"{bucket}/a.tar", "webdataset"),
        (f"{bucket}/b.TAR.GZ", "webdataset"),
        (f"{bucket}/c.tgz", "webdataset"),
        (f"{bucket}/d.parquet", "parquet"),
    ]
    assert listing.ignored == {IgnoreReason.FORMAT: 3}


def test_shard_has_version_and_size_of_its_object(storage: Storage, bucket: str) -> None:
    info = storage.write(f"{bucket}/a.tar", b"12345")
    assert list(list_shards(storage, bucket)) == [Shard(info.uri, info.version, "webdataset", 5)]


def test_hidden_names_are_ignored_and_counted(storage: Storage, tmp_path: Path) -> None:
    root = f"{tmp_path}/_hidden/.root"  # the input URI itself may have hidden parts
    hidden = ["_SUCCESS", "_x/1.tar", ".DS_Store", "a/.x.tar", "__MACOSX/a.jpg", "._a.jpg"]
    write(storage, root, *hidden, "a/_b.d/1.tar", "a/b_.c/1.tar")
    for format in ("auto", "webdataset"):
        listing = list_shards(storage, root, format)
        assert [shard.uri for shard in listing] == [f"{root}/a/b_.c/1.tar"]
        assert listing.ignored == {IgnoreReason.HIDDEN: len(hidden) + 1}


@pytest.mark.parametrize("suffix", TAR_SUFFIXES)
def test_metadata_of_tars_are_no_shards_in_any_format(suffix: str) -> None:
    names = ["x.parquet", f"x{suffix}", "x_stats.json", "y.parquet", "y_stats.json", "z_stats.json"]
    formats: list[tuple[InputFormat, list[str]]] = [
        ("auto", [f"x{suffix}", "y.parquet"]),
        ("webdataset", [f"x{suffix}"]),
        ("parquet", ["y.parquet"]),
        ("images", []),
    ]
    for format, shards in formats:
        listing = list_shards(FakeListing(names), "s3://b", format)
        assert [shard.uri for shard in listing] == [f"s3://b/{name}" for name in shards]
        assert listing.ignored[IgnoreReason.METADATA] == 2
        assert listing.ignored.total() == len(names) - len(shards)


def test_input_can_be_a_single_object(storage: Storage, tmp_path: Path) -> None:
    write(storage, str(tmp_path), "_a.tar", "_a.tar.gz")
    assert [shard.uri for shard in list_shards(storage, f"{tmp_path}/_a.tar")] == [f"{tmp_path}/_a.tar"]


def test_empty_prefix_has_no_shards_but_missing_folder_fails(
    storage: Storage, bucket: str, tmp_path: Path
) -> None:
    assert list(list_shards(storage, f"{bucket}/empty")) == []
    with pytest.raises(ObjectNotFound):
        list(list_shards(storage, f"{tmp_path}/missing"))


def test_listing_streams(tmp_path: Path) -> None:
    class Endless(Storage):
        def list(self, uri: str, missing_ok: bool = True, prefix: str = "") -> Iterator[ObjectInfo]:
            return (ObjectInfo(f"s3://b/{i:09d}.tar", 1, "v-1") for i in itertools.count())

    first = itertools.islice(list_shards(Endless(), "s3://b"), 3)
    assert [shard.uri for shard in first] == [f"s3://b/{i:09d}.tar" for i in range(3)]


# Groups of image files ---------------------------------------------------------------------------


def groups_of(names: list[str]) -> dict[str, Shard]:
    shards = list(list_shards(FakeListing(names), "s3://b/photos", "images"))
    by_uri = {shard.uri: shard for shard in shards}
    assert len(by_uri) == len(shards)
    return by_uri


NAMES = [f"photos/2024/{i:07d}.jpg" for i in range(0, 60_000, 2)]


def test_image_files_form_a_group(storage: Storage, bucket: str) -> None:
    write(storage, bucket, "in/b.JPEG", "in/a/c.png", "in/a/notes.txt", "in/d.webp")
    (group,) = list_shards(storage, f"{bucket}/in")
    assert group.format == "images"
    assert [info.uri for info in group.members] == [
        f"{bucket}/in/{name}" for name in ("a/c.png", "b.JPEG", "d.webp")
    ]
    assert group.size == 3
    assert group.uri == f"{bucket}/in/images-0000000000000000"


def test_groups_have_every_image_once_and_about_a_thousand_each() -> None:
    groups = groups_of(NAMES)
    members = [info.uri for shard in groups.values() for info in shard.members]
    assert members == [f"s3://b/{name}" for name in NAMES]
    assert 20 <= len(groups) <= 45  # 30 expected


def test_adding_an_image_changes_only_its_group() -> None:
    before = groups_of(NAMES)
    for number in (1, 30_001, 59_999):  # in the first, a middle and the last group
        added = f"photos/2024/{number:07d}.jpg"
        after = groups_of([*NAMES, added])
        changed = [uri for uri in before if after.get(uri) != before[uri]]
        assert len(changed) == 1
        assert f"s3://b/{added}" in [info.uri for info in after[changed[0]].members]


def test_image_that_starts_a_group_splits_only_one_group() -> None:
    starts = [shard.members[0].uri.removeprefix("s3://b/") for shard in groups_of(NAMES).values()][1:]
    without = [name for name in NAMES if name != starts[5]]
    before, after = groups_of(without), groups_of(NAMES)
    assert len(after) == len(before) + 1
    assert len([uri for uri in before if after.get(uri) != before[uri]]) == 1


def test_changed_image_changes_the_version_of_its_group(storage: Storage, bucket: str) -> None:
    write(storage, bucket, "a.jpg", "b.jpg")
    (before,) = list_shards(storage, bucket)
    (same,) = list_shards(storage, bucket)
    storage.write(f"{bucket}/b.jpg", b"other bytes")
    (after,) = list_shards(storage, bucket)
    assert before == same
    assert before.uri == after.uri
    assert before.version != after.version


def test_folder_may_contain_tars_and_image_files(storage: Storage, tmp_path: Path) -> None:
    write(storage, str(tmp_path), "a.jpg", "b.tar", "c.jpg")
    found = [(shard.format, len(shard.members)) for shard in list_shards(storage, str(tmp_path))]
    assert found == [("webdataset", 0), ("images", 2)]


# Names of prediction files -----------------------------------------------------------------------

ODD_NAMES = [
    "train/0000.tar",
    "train/0000.tar.parquet",
    "../../etc/x.tar",
    "..",
    "./x",
    "a/./x",
    "a/../x",
    "a//x",
    "a///x",
    "/x",
    "//x",
    "a%2Fx",
    "a%252Fx",
    "a/%2Fx",
    "label=cat/x.tar",
    'a*b?[c]{d}\\e:f#g"h<i>|j\n',
    ".hidden/_x/._y",
    "sp ace/ü/日本.tar",
    "x.tar",
    "X.tar",
]


def test_normal_names_stay_readable() -> None:
    assert prediction_path("s3://b/train/0000.tar") == "s3/b/train/0000.tar.parquet"
    assert prediction_path("gs://b/a-b_c/ü 1.tar.gz") == "gs/b/a-b_c/ü 1.tar.gz.parquet"
    assert prediction_path("/data/x.tar") == "file/data/x.tar.parquet"
    assert prediction_path("s3://b/in/images-0123456789abcdef") == "s3/b/in/images-0123456789abcdef.parquet"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_path_decodes_to_the_uri_and_stays_in_its_folder(name: str) -> None:
    path = prediction_path(f"s3://bucket/{name}")
    assert unquote(path) == f"s3/bucket/{name}.parquet"
    assert posixpath.normpath(path) == path
    assert not path.startswith(("/", "../"))
    assert all(part and part[0] not in "._" for part in path.split("/"))
    assert not set(path) & set("*?[]{}\\:=#")


def test_no_two_uris_share_a_path() -> None:
    folders = ("s3://bucket", "gs://bucket", "/bucket", "/s3/bucket")
    uris = {f"{folder}/{name}" for folder in folders for name in ODD_NAMES}
    distinct = {normalize_uri(uri) for uri in uris}
    assert len({prediction_path(uri) for uri in distinct}) == len(distinct)


#: Long names with characters of 1 to 4 bytes, which differ before, at or after the end of the truncated path.
LONG_NAMES = [
    f"{start}{character * count}{end}"
    for start in ("", "a/", "." * 3, "deep/" * 150)
    for character in ("x", "ü", "日", "\U0001f600", "%", "x/", " ")
    for count in (60, 190, 200, 243, 248, 256, 700, 1000)
    for end in (".tar", "1.tar", "~" * 10, "/x.tar")
]


def storable(path: str) -> bool:
    return len(path.encode()) <= 800 and all(len(part.encode()) <= 255 for part in path.split("/"))


def test_long_names_are_truncated_to_the_limits() -> None:
    for name in LONG_NAMES:
        path = prediction_path(f"s3://bucket/{name}")
        assert storable(path), name
        assert posixpath.normpath(path) == path
        assert all(part and part[0] not in "._" for part in path.split("/"))
        assert not set(path) & set("*?[]{}\\:=#")
        whole = f"s3/bucket/{name}.parquet"
        if "%7E" in path:  # the longest prefix without a partial character
            kept, _, end = path.rpartition("%7E")
            assert whole.startswith(unquote(kept, errors="strict"))
            assert re.fullmatch(r"[0-9a-f]{40}\.parquet", end)
        else:
            assert unquote(path) == whole


def test_no_two_uris_share_a_truncated_path() -> None:
    folders = ("s3://bucket", "/s3/bucket")
    uris = {f"{folder}/{name}" for folder in folders for name in LONG_NAMES}
    paths = {uri: prediction_path(uri) for uri in uris}
    assert sum("%7E" in path for path in paths.values()) > 500
    # Also add URIs that equal the prediction paths of other URIs, encoded or decoded.
    uris |= {f"s3://bucket/{path.partition('/')[2]}" for path in paths.values()}
    uris |= {f"/{unquote(path)}" for path in paths.values()}
    uris |= {f"/{path.partition('/')[2].removesuffix('.parquet')}" for path in paths.values()}
    distinct = {normalize_uri(uri) for uri in uris}
    assert len({prediction_path(uri) for uri in distinct}) == len(distinct)


@pytest.mark.parametrize(
    ("allowed", "too_long"),
    [
        (f"{'x' * 243}.tar", f"{'x' * 244}.tar"),  # with .parquet, 255 and 256 bytes
        (f"{'日' * 81}.tar", f"{'日' * 82}.tar"),
        (f"{'x' * 255}/y.tar", f"{'x' * 256}/y.tar"),
        (f"{'dd/' * 260}yyy.tar", f"{'dd/' * 260}yyyy.tar"),  # with s3/b/ and .parquet, 800 and 801
    ],
)
def test_path_within_the_limits_is_not_truncated(allowed: str, too_long: str) -> None:
    assert prediction_path(f"s3://b/{allowed}") == f"s3/b/{allowed}.parquet"
    assert is_allowed_path(f"s3/b/{allowed}.parquet")
    assert "%7E" in prediction_path(f"s3://b/{too_long}")
    assert not is_allowed_path(f"s3/b/{too_long}.parquet")


def test_truncated_path_is_stable() -> None:
    """A different path would orphan the existing prediction file, and relabel the shard."""
    path = prediction_path(f"s3://b/{'x' * 300}.tar")
    assert path == f"s3/b/{'x' * 204}%7E0cb7e3aef221994fc33d29b1444ccad5f1a13089.parquet"


def test_ignored_objects_are_counted_by_extension() -> None:
    names = ["a.xyz", "b.XYZ", "c.rar", "README", "_x.txt", *(f"d.{i}z" for i in range(60)), "e.tar"]
    listing = ShardListing((ObjectInfo(f"s3://b/in/{name}", 1, "v") for name in sorted(names)), "s3://b/in")
    assert [shard.uri for shard in listing] == ["s3://b/in/e.tar"]
    counts = listing.ignored_extensions
    assert counts[IgnoreReason.FORMAT, ".xyz"] == 2
    assert counts[IgnoreReason.HIDDEN, ".txt"] == 1
    assert counts.total() == listing.ignored.total() == 65
    assert len(counts) <= 52  # names come from the input, so their number is bounded


@pytest.mark.parametrize(
    ("name", "extension"),
    [
        ("x.tar.ZST", ".tar.zst"),
        ("a.b/c", "none"),
        (".x", "none"),
        ("2024 at 10.11", ".11"),
        ("a.tbz2", ".tbz2"),
    ],
)
def test_extension_of_a_compressed_tar_names_both(name: str, extension: str) -> None:
    assert file_extension(name) == extension
