"""Labels of datasets become classes of the model, or say why they don't."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError, InputConfig
from pipeline.read import load_targets
from pipeline.read.targets import _WORDNET_IDS, Targets, hive_label
from pipeline.storage import Storage, StorageError

FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"]
NO_CLASS = "is not a class of the model"


def imagenet() -> list[str]:
    """A model's names that are ImageNet's where the names identify ImageNet, with synonyms."""
    names = [f"class {i}" for i in range(1000)]
    names[:2] = ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    names[124], names[358], names[359] = "crayfish, crawfish", "polecat, fitch", "ferret, polecat"
    names[134] = names[517] = "crane"
    names[207], names[388], names[985] = "golden retriever", "giant panda, panda", "daisy"
    names[638:640] = ["maillot", "maillot, tank suit"]
    return names


@pytest.mark.parametrize(
    "label", ["3", "03", "3.0", " 3\r\n", "\ufeff3", "3\0\0", b"3", b"3\0", 3, 3.0, Decimal(3)]
)
def test_label_of_any_type_can_be_a_class_id(label: object) -> None:
    assert Targets(FASHION).find(label) == (3, None)


@pytest.mark.parametrize("label", [None, math.nan, Decimal("NaN"), -1, -1.0, "-1", b"-1", Decimal(-1)])
def test_missing_label_is_no_target_and_no_problem(label: object) -> None:
    assert Targets(FASHION).find(label) == Targets(FASHION, FASHION).find(label) == (None, None)


@pytest.mark.parametrize("label", [True, 3.5, math.inf, "", "３", [3], {"a": 3}, b"\xff"])  # noqa: RUF001
def test_label_that_names_no_class_is_a_problem(label: object) -> None:
    target, problem = Targets(FASHION).find(label)
    assert target is None
    assert NO_CLASS in str(problem)


def test_name_that_differs_in_case_is_no_match() -> None:
    hint = "did you mean 'Sneaker'?"
    assert Targets(FASHION).find("sneaker") == (None, f"'sneaker' {NO_CLASS}; {hint}")


def test_names_of_digits_win_over_ids_and_numbers_stay_ids() -> None:
    targets = Targets(["5", "7", "x"])
    assert [targets.find(label)[0] for label in ("7", "5", "2", 2, 1)] == [1, 0, 2, 2, 1]
    assert targets.find(5) == (None, "5 is not in 0..2")


def test_integers_and_their_texts_are_indices_of_the_names_of_the_dataset() -> None:
    names = ["Bag", "3", "boot", "Coat"]
    for targets, of_file in ((Targets(FASHION), names), (Targets(FASHION, names), ["Trouser"])):
        assert [targets.find(label, of_file)[0] for label in (0, "0", 3, "Coat", "Shirt")] == [8, 8, 4, 4, 6]
        assert targets.find(1, of_file) == targets.find("3", of_file) == (None, f"'3' {NO_CLASS}")
        assert targets.find("2", of_file) == (None, f"'boot' {NO_CLASS}; did you mean 'Boot'?")
        assert targets.find(4, of_file) == (None, "4 is not in 0..3")


@pytest.mark.parametrize(
    ("classes", "names", "expected"),
    [
        (["no", "yes"], None, [1, 0]),
        (["true", "false"], None, [0, 1]),  # by name
        (["yes", "no"], ["no", "yes"], [0, 1]),
        (["yes", "no", "maybe"], ["no", "yes"], [0, 1]),
        (["a", "b", "c"], None, [None, None]),
        (["a", "b"], ["x", "b", "a"], [None, None]),
    ],
)
def test_boolean_is_a_class_of_two(classes: list[str], names: list[str] | None, expected: list[int]) -> None:
    targets = Targets(classes, names)
    assert [targets.find(True)[0], targets.find(False)[0]] == expected


def test_mapping_goes_first_and_may_map_several_classes_to_one() -> None:
    mapping = {
        "trainers": "Sneaker",
        "plimsolls": "Sneaker",
        "Bag": "Coat",
        "x": "0",
        "3": "Shirt",
        "true": "Bag",
    }
    targets = Targets(FASHION, mapping=mapping)
    labels = ["trainers", "plimsolls", "Bag", "x", 3, "3", True, "Dress", 4]
    assert [targets.find(label)[0] for label in labels] == [7, 7, 4, 0, 6, 6, 8, 3, 4]
    named = Targets(FASHION, ["trainers", "plimsolls", "Bag", "Coat"], mapping)
    assert [named.find(label)[0] for label in (0, 1, 2, 3, "trainers")] == [7, 7, 4, 6, 7]
    assert Targets(["c", "d"], ["d", "d"]).find(1) == (1, None)


def test_class_of_the_model_that_a_mapping_lacks_fails() -> None:
    for mapping, problem in [
        ({"a": "Sneakr"}, f"'a': 'Sneakr' {NO_CLASS}; set the name or id"),
        ({"a": "10"}, f"'a': '10' {NO_CLASS}; set"),
        ({"a": "-1"}, f"'a': '-1' {NO_CLASS}; set"),
    ]:
        with pytest.raises(ValueError, match=problem):
            Targets(FASHION, mapping=mapping)
    with pytest.raises(
        ValueError, match="'crane' is the name of several classes of the model; set the name or id"
    ):
        Targets(["crane", "crane"], mapping={"a": "crane"})
    assert Targets(["crane", "crane"], mapping={"a": "1"}).find("a") == (1, None)


def test_wordnet_ids_name_the_classes_of_imagenet_models_only() -> None:
    ids = _WORDNET_IDS.read_text().split()
    assert (len(ids), len(set(ids)), ids == sorted(ids)) == (1000, 1000, True)
    targets = Targets(imagenet())
    assert [targets.find(each)[0] for each in ids] == list(range(1000))
    assert targets.find("n01440765") == (None, f"'n01440765' {NO_CLASS}")
    for names in (FASHION, [f"class {i}" for i in range(1000)], imagenet()[::-1], imagenet()[:999]):
        assert Targets(names).find("n01440764") == (None, f"'n01440764' {NO_CLASS}")


def test_unambiguous_part_of_a_name_names_the_class() -> None:
    names = imagenet()
    targets = Targets(names)
    parts = ["tench", "Tinca tinca", "tench, Tinca tinca", "ferret", "panda", "tank suit", "maillot"]
    assert [targets.find(part)[0] for part in parts] == [0, 0, 0, 359, 388, 639, 638]
    for shared in ("polecat", "crane"):
        assert targets.find(shared) == (None, f"{shared!r} is the name of several classes of the model")
    assert [targets.find(i, names)[0] for i in range(1000)] == list(range(1000))
    short = [name.split(",")[0] for name in names]  # "maillot" twice: each could be the other
    found = {i: targets.find(i, short)[0] for i in range(1000)}
    assert {i for i, target in found.items() if target != i} == {358, 639}
    assert found[358] is found[639] is None
    assert Targets(["10, 20", "b,"]).find("10") == (None, "'10' is not in 0..1")
    assert Targets(["10, 20", "b, "]).find("") == (None, f"'' {NO_CLASS}")


# Files -------------------------------------------------------------------------------------------


def section(**fields: Any) -> InputConfig:
    return InputConfig(uri="/in", **fields)


def test_content_of_files_counts_and_not_their_path(tmp_path: Path) -> None:
    names = ["Bag", "Coat, or jacket"]
    texts = {
        "a.txt": "Bag\nCoat, or jacket\n",
        "b.txt": "\ufeffBag\r\nCoat, or jacket\r\n",
        "c.json": json.dumps(names),
        "d.json": json.dumps({"1": names[1], "0": names[0]}),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, newline="")
    expected = section(target_names=names)
    for name in texts:
        loaded = load_targets(Storage(), section(target_names=f"{tmp_path}/{name}"), FASHION)
        assert loaded == expected
    (tmp_path / "map.json").write_text('\ufeff{"b": "Bag", "a": 8}')
    loaded = load_targets(Storage(), section(target_map=f"file://{tmp_path}/map.json"), FASHION)
    assert loaded == section(target_map={"a": "8", "b": "Bag"})
    assert load_targets(Storage(), section(), FASHION) == section()


@pytest.mark.parametrize(
    ("field", "name", "content", "cause"),
    [
        ("target_names", "n.txt", None, "no such"),
        ("target_names", "n.txt", "a\n\nb\n", "the name of class 1 is empty"),
        ("target_names", "n.json", '["a", 1]', "expected a list of names"),
        ("target_map", "m.json", "[1]", "'the file': [1] is no name or id; expected"),
        ("target_map", "m.json", '{"a": "Bag", "b": 1.5}', "'b': 1.5 is no name or id; expected"),
        ("target_map", "m.json", '{"a": "Bag", "a": "Coat"}', "'a' is in the file more than once; remove"),
        ("target_map", "m.json", '{"a": {"b": true}}', "'b': True is no name or id; expected"),
        ("target_map", "m.json", "a", "Expecting value"),
        ("target_map", "m.json", b"\xff", "can't decode"),
        ("target_map", "m.json", '{"a": ' * 100_000, "recursion"),
        ("target_map", "m.json", '{"a": "Bagg"}', f"'a': 'Bagg' {NO_CLASS}"),
    ],
)
def test_invalid_file_is_named_with_its_field(
    tmp_path: Path, field: str, name: str, content: str | bytes | None, cause: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        load_targets(Storage(), section(**{field: str(path)}), FASHION, "train")
    assert str(caught.value).startswith(f"train.{field}: {path}: ")
    assert cause in str(caught.value)
    assert "cvt-label-tmp" not in str(caught.value)


def test_file_has_a_maximum_size_and_a_map_in_the_configuration_is_checked(tmp_path: Path) -> None:
    (tmp_path / "n.txt").write_bytes(b"x\n" * 5 * 1024**2)
    with pytest.raises(StorageError, match=r"n\.txt: .*8"):
        load_targets(Storage(), section(target_names=f"{tmp_path}/n.txt"), FASHION)
    with pytest.raises(ConfigError, match=r"input\.target_map: 'a': 'Bagg' is not a class"):
        load_targets(Storage(), section(target_map={"a": "Bagg"}), FASHION)


# Folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "column", "label"),
    [
        ("s3://b/t/label=3/x.parquet", None, "3"),
        ("s3://b/t/label=3/x.parquet", "label", "3"),
        ("s3://b/t/label=3/day=2/x.parquet", "label", "3"),
        ("s3://b/t/label=T-shirt%2Ftop/x.parquet", None, "T-shirt/top"),
        ("s3://b/t/my%20label=a=b/x.parquet", "my label", "a=b"),
        ("s3://b/t/label=__HIVE_DEFAULT_PARTITION__/x.parquet", None, None),
    ],
)
def test_folder_of_hive_has_the_label(uri: str, column: str | None, label: str | None) -> None:
    assert hive_label(uri, column) == (label, None)


def test_path_without_the_folder_of_hive_is_a_problem() -> None:
    assert hive_label("s3://b/t/a=1/x=2.parquet", "label")[1] == (
        "the path has no folder label=value (label_from: folder)"
    )


def test_label_is_in_one_folder_only_without_a_column() -> None:
    label, problem = hive_label("s3://b/t/my%20label=3/day=2/x.parquet", None)
    assert label is None
    assert str(problem).endswith("several folders name=value: set input.label_column to one of the names")
