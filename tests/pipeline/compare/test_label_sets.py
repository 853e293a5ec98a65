"""Opening and comparing the label sets of stored partitions."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.compare import LabelSet, NoPreviousRunError, compare_label_sets
from pipeline.storage import Storage, StorageError
from tests.partitions import make_predictions, random_given, write_partition

LABELS = ["boot", "bag", "coat"]
OTHER_LABELS = ["coat", "boot", "[bold]hat\x1b[31m"]


def make_models(root: str, storage: Storage) -> tuple[str, str]:
    """Writes labels of two models with different classes. The second has a changed and a missing shard."""
    a, b = f"{root}/out/model=a-00000000", f"{root}/out/model=b-11111111"
    first = {"0.tar": [0, 0, 1, 2, None, 1], "1.tar": [2, 2], "changed.tar": [0] * 4, "zz.tar": [1, None, 1]}
    second = {"0.tar": [1, 1, 2, 0, 0, None], "1.tar": [0, 2], "changed.tar": [1] * 4}
    for uri, labels, given, versions in (
        (a, LABELS, first, {}),
        (b, OTHER_LABELS, second, {f"{root}/in/changed.tar": "v2"}),
    ):
        shards = {f"{root}/in/{name}": ids for name, ids in given.items()}
        made = {shard: make_predictions(shard, labels, ids) for shard, ids in shards.items()}
        write_partition(storage, uri, labels, [made], versions=versions)
    return a, b


@pytest.fixture
def models(tmp_path: Path) -> tuple[str, str]:
    return make_models(str(tmp_path), Storage())


def open_label_sets(*names: str) -> list[LabelSet]:
    return [LabelSet.open(Storage(), name) for name in names]


def prediction_file(uri: str, name: str) -> Path:
    [path] = Path(uri, "predictions").rglob(f"{name}.parquet")
    return path


def test_samples_labeled_in_both_are_compared_by_class_name(models: tuple[str, str]) -> None:
    found = compare_label_sets(*open_label_sets(*models))
    agreement, labels = found.agreement, found.drift.classes.labels
    assert agreement is not None
    assert labels == ["boot", "bag", "coat", "[bold]hat\x1b[31m"]
    assert (agreement.compared, int(agreement.same.sum())) == (6, 4)
    # One is an error row in the second model. The others are in the changed shard and in the missing shard.
    assert (agreement.only_a, agreement.only_b) == (1 + 4 + 2, 1 + 4)
    assert (agreement.shards, agreement.changed_shards) == (2, 1)
    top = [(labels[a], labels[b], n) for a, b, n in agreement.disagreements.most_common(5)]
    assert top == [("bag", labels[3], 1), ("coat", labels[3], 1)]
    chance = (2 * 2 + 1 * 0 + 3 * 2 + 0 * 2) / 36
    assert agreement.kappa == pytest.approx((4 / 6 - chance) / (1 - chance))
    assert found.drift.count_a.tolist() == [6, 4, 3, 0]
    assert found.drift.count_b.tolist() == [6, 0, 3, 2]


def test_files_of_shards_without_a_counterpart_are_not_opened(models: tuple[str, str]) -> None:
    before = compare_label_sets(*open_label_sets(*models)).totals
    for uri, name in ((models[0], "changed.tar"), (models[1], "changed.tar"), (models[0], "zz.tar")):
        prediction_file(uri, name).unlink()
    assert compare_label_sets(*open_label_sets(*models)).totals == before


@pytest.mark.parametrize("what", ["relabeled", "deleted"])
def test_shard_changed_after_the_manifest_is_counted_but_not_compared(
    models: tuple[str, str], tmp_path: Path, what: str
) -> None:
    if what == "relabeled":
        manifest, shard = Path(models[0], "manifest.parquet"), f"{tmp_path}/in/1.tar"
        content = manifest.read_bytes()
        newer = {shard: make_predictions(shard, LABELS, [1, 1])}
        write_partition(Storage(), models[0], LABELS, [newer], versions={shard: "v2"})
        manifest.write_bytes(content)
    else:
        prediction_file(models[0], "1.tar").unlink()
    agreement = compare_label_sets(*open_label_sets(*models)).agreement
    assert agreement is not None
    assert (agreement.shards, agreement.changed_shards, agreement.compared) == (1, 2, 4)
    assert (agreement.only_a, agreement.only_b) == (7 + 2, 5 + 2)


def test_invalid_prediction_file_is_named(models: tuple[str, str]) -> None:
    prediction_file(models[0], "1.tar").write_bytes(b"another format")
    with pytest.raises(StorageError, match=r"1\.tar\.parquet: not a prediction file"):
        compare_label_sets(*open_label_sets(*models))


def test_runs_of_a_partition_are_compared_by_their_current_labels(tmp_path: Path) -> None:
    uri = f"{tmp_path}/model=a-00000000"
    days = [
        {f"/in/{day}-{i}.tar": random_given(500, weights, seed=i) for i in range(2)}
        for day, weights in enumerate(([1, 1, 1], [1, 1, 1], [1, 6, 1]))
    ]
    made = [{shard: make_predictions(shard, LABELS, given) for shard, given in day.items()} for day in days]
    # The last run relabels the shards of the first run.
    ids = write_partition(Storage(), uri, LABELS, [*made, made[0]])
    similar = compare_label_sets(*open_label_sets(f"{uri}@{ids[1]}", f"{uri}@{ids[3]}"))
    assert (similar.drift.images_a, similar.drift.images_b) == (1000, 1000)
    assert similar.drift.psi < 0.1
    drifted = compare_label_sets(*open_label_sets(f"{uri}@{ids[1]}", f"{uri}@{ids[2]}"))
    assert drifted.agreement is None
    assert drifted.drift.psi > 0.5
    assert [each.run for each in open_label_sets(f"{uri}@previous", f"{uri}@latest")] == [ids[2], ids[3]]
    for run in (ids[0], "20260101T000000.000000Z-ffffff"):  # relabeled by a later run; unknown run
        with pytest.raises(
            StorageError, match=f"no labels of this run; runs with labels: {', '.join(ids[1:])}"
        ):
            open_label_sets(f"{uri}@{run}")


def test_name_without_a_valid_run_is_no_partition(models: tuple[str, str]) -> None:
    for name in (f"{models[0]}@nope", f"{models[0]}/model=x@nope"):
        with pytest.raises(StorageError, match=f"^{name}: not a partition"):
            open_label_sets(name)


def test_previous_run_of_the_only_run_raises_a_specific_error(models: tuple[str, str]) -> None:
    with pytest.raises(NoPreviousRunError, match="all labels are of one run"):
        open_label_sets(f"{models[0]}@previous")


def test_agreement_of_a_run_and_a_model_covers_the_shards_of_the_run(tmp_path: Path) -> None:
    a, b, storage = f"{tmp_path}/model=a-00000000", f"{tmp_path}/model=b-11111111", Storage()
    shards = [f"/in/{i}.tar" for i in range(3)]
    made = [{shard: make_predictions(shard, LABELS, [i, 2])} for i, shard in enumerate(shards)]
    ids = write_partition(storage, a, LABELS, made)
    labels_b = {shard: make_predictions(shard, LABELS, [1, 2]) for shard in shards}
    write_partition(storage, b, LABELS, [labels_b])
    found = compare_label_sets(*open_label_sets(f"{a}@{ids[0]}", b))
    assert found.agreement is not None
    assert (found.agreement.compared, found.agreement.fraction, found.agreement.only_b) == (2, 0.5, 4)
    assert (found.drift.images_a, found.drift.images_b) == (2, 6)
    without = compare_label_sets(*open_label_sets(a, b), with_agreement=False).table()
    assert without["same"].null_count == without.num_rows == 3


def test_partition_without_labels_cannot_be_compared(tmp_path: Path) -> None:
    uri = f"{tmp_path}/model=a-00000000"
    write_partition(Storage(), uri, LABELS, [{"/in/x.tar": make_predictions("/in/x.tar", LABELS, [None])}])
    with pytest.raises(StorageError, match="the label set has no labeled image"):
        compare_label_sets(*open_label_sets(uri, uri))
