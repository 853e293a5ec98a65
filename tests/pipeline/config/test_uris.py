"""URIs, lists and glob patterns of an input, and what they select, contain and exclude."""

from __future__ import annotations

import pytest

from pipeline.config import ConfigError, InputUris
from pipeline.config.input import InputConfig

GROUP = "images-0123456789abcdef"


@pytest.mark.parametrize(
    ("pattern", "selected", "others"),
    [
        ("s3://b/*.tar", ["x.tar", ".x.tar", "x.tar/bytes-000000000000"], ["a/x.tar", "x.tar.gz", "x.TAR"]),
        ("s3://b/**/*.tar", ["x.tar", "a/x.tar", "a/b/x.tar"], ["x.tgz"]),
        ("s3://b/a/**", ["a/x", "a/b/c"], ["b/x", "a", "ab/x"]),
        ("s3://b/x?.tar", ["x1.tar"], ["x.tar", "x12.tar", "x/.tar"]),
        ("s3://b/[a-c].tar", ["a.tar", "c.tar"], ["d.tar", "A.tar"]),
        ("s3://b/[!a].tar", ["b.tar"], ["a.tar"]),
        ("s3://b/{a,b}.tar", ["a.tar", "b.tar"], ["c.tar", "ab.tar"]),
        ("s3://b/{08..11}.tar", ["08.tar", "11.tar"], ["8.tar", "12.tar", "9.tar"]),
        ("s3://b/{a,b}/*.{jpg,png}", ["a/x.jpg", "b/y.png"], ["c/x.jpg", "a/x.gif"]),
        ("s3://b/day-*", ["day-1/x.tar", "day-2/c/y.jpg", "day-3"], ["x/day-1"]),  # folders
        (r"s3://b/\*[a].tar", ["*a.tar"], ["xa.tar"]),
        ("s3://b/a.tar", ["a.tar", "a.tar/bytes-000000000000"], ["a.tar.gz", "a"]),
    ],
)
def test_pattern_contains_matching_objects_and_their_parts(
    pattern: str, selected: list[str], others: list[str]
) -> None:
    uris = InputUris.parse(pattern)
    assert [name for name in selected + others if uris.contains(f"s3://b/{name}")] == selected


def test_group_of_image_files_belongs_to_its_folder_or_patterns() -> None:
    uris = InputUris.parse(["s3://b/a/*.jpg", "s3://b/a/*.png", "s3://b/c"], ["d/**"])
    assert list(uris.roots) == ["s3://b/a", "s3://b/c"]
    suffix = uris.group_suffix("s3://b/a")
    assert uris.contains(f"s3://b/a/{GROUP}{suffix}")
    assert not uris.contains(f"s3://b/a/{GROUP}")
    assert not uris.contains(f"s3://b/a/x/{GROUP}{suffix}")
    assert not InputUris.parse("s3://b/a/*.jpg").contains(f"s3://b/a/{GROUP}{suffix}")
    assert uris.group_suffix("s3://b/c") == ""
    assert uris.contains(f"s3://b/c/{GROUP}")
    assert InputUris.parse("s3://b/c").contains(f"s3://b/c/x/{GROUP}{suffix}")
    assert not uris.contains(f"s3://b/{GROUP}")
    assert not uris.contains(f"s3://b/c/d/{GROUP}")  # of an excluded folder
    assert InputUris.parse("s3://b/x[1]").contains(f"s3://b/x[1]/{GROUP}")  # of a folder with this name


def test_roots_are_the_outermost_folders() -> None:
    uris = ["s3://b/x/a", "s3://b/x/*.jpg", "s3://b/x-1/*", "s3://b/y/z", "s3://b/y", "s3://b/y/z/{1..3}.tar"]
    assert list(InputUris.parse(uris).roots) == ["s3://b/x-1", "s3://b/x", "s3://b/y"]


@pytest.mark.parametrize(
    ("exclude", "excluded", "others"),
    [
        ("*.jpg", ["a.jpg", "x/b.jpg", "x.jpg/c"], ["a.jpgx"]),
        ("val", ["val", "val/x", "train/val/x"], ["vals/x"]),
        ("val/", ["val/x", "train/val/x"], ["vals/x"]),
        ("val/**", ["val/x", "val/a/x"], ["val", "train/val/x"]),
        ("train/*/x.tar", ["train/a/x.tar"], ["train/x.tar", "train/a/b/x.tar"]),
        ("s3://b/in/q*", ["q/1", "q.tar"], ["x/q"]),
        ("{m,n}", ["m/1", "x/n"], ["mn"]),
        ("x/[y]", ["x/y"], ["z/x/y"]),
    ],
)
def test_exclude_is_relative_or_a_uri(exclude: str, excluded: list[str], others: list[str]) -> None:
    for root in ("s3://b/in", "s3://b/in/*"):
        uris = InputUris.parse(root, [exclude])
        assert [name for name in excluded + others if not uris.contains(f"s3://b/in/{name}")] == excluded


def test_equal_inputs_have_any_order() -> None:
    one, other = (InputUris.parse(uris) for uris in (["s3://b/a", "s3://b/*"], ["s3://b/*", "s3://b/a"]))
    assert one == other
    assert one != InputUris.parse("s3://b/a")
    assert one != InputUris.parse(["s3://b/a", "s3://b/*"], ["x"])
    assert (
        str(InputUris.parse([f"s3://b/{i}" for i in range(9)])) == "s3://b/0, s3://b/1, s3://b/2 and 6 more"
    )


def test_output_may_only_be_in_a_folder_without_matches() -> None:
    def covers(pattern: str) -> bool:
        return InputUris.parse(["s3://c", pattern]).covers("s3://b/labels")

    assert all(
        map(covers, ("s3://b", "s3://b/*", "s3://b/**/*.parquet", "s3://b/labels", "s3://b/l*/m/**")[:4])
    )
    assert not any(map(covers, ("s3://b/*.tar", "s3://b/train/**", "s3://b/**/*.tar", "s3://b/lab")))


def test_wide_braces_and_wildcards_in_buckets_are_refused() -> None:
    for uri, message in (
        ("s3://*/x", "bucket must not have wildcards"),
        ("s3://b{1,2}/x", "bucket must not have wildcards"),
        ("s3://b/{0000000..9999999}.tar", "stand for more than 100,000 URIs"),
    ):
        with pytest.raises(ConfigError, match=message):
            InputUris.parse(uri)
        with pytest.raises(ValueError, match=message):
            InputConfig(uri=["s3://b/x", uri])
