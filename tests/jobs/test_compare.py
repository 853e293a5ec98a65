"""`compare` as a person meets it, against partitions in a real S3 server."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import Result
from typer.testing import CliRunner

from jobs.compare import compare as command
from jobs.console import make_app
from pipeline.compare import LabelSet, compare
from pipeline.statistics.comparison import COMPARISON_SCHEMA, TOTALS
from pipeline.storage import Storage
from tests.partitions import make_predictions, random_given, write_partition

LABELS = ["boot", "bag", "coat"]


def cvt_label(*arguments: object) -> Result:
    app = make_app()
    app.command()(command)
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def models(bucket: str, storage: Storage) -> tuple[str, str]:
    """Two models' labels of the same shards, but for what is in one alone; the second has other classes."""
    a, b = f"{bucket}/out/model=a-00000000", f"{bucket}/out/model=b-11111111"
    first = {
        f"{bucket}/in/0.tar": make_predictions(f"{bucket}/in/0.tar", LABELS, [0, 0, 1, 2, None, 1]),
        f"{bucket}/in/1.tar": make_predictions(f"{bucket}/in/1.tar", LABELS, [2, 2]),
        f"{bucket}/in/changed.tar": make_predictions(f"{bucket}/in/changed.tar", LABELS, [0] * 4),
        f"{bucket}/in/zz.tar": make_predictions(f"{bucket}/in/zz.tar", LABELS, [1, None, 1]),
    }
    other = ["coat", "boot", "[bold]hat\x1b[31m"]
    second = {
        f"{bucket}/in/0.tar": make_predictions(f"{bucket}/in/0.tar", other, [1, 1, 2, 0, 0, None]),
        f"{bucket}/in/1.tar": make_predictions(f"{bucket}/in/1.tar", other, [0, 2]),
        f"{bucket}/in/changed.tar": make_predictions(f"{bucket}/in/changed.tar", other, [1] * 4),
    }
    write_partition(storage, a, LABELS, [first])
    write_partition(storage, b, other, [second], versions={f"{bucket}/in/changed.tar": "v2"})
    return a, b


def test_samples_that_both_have_labelled_are_compared_by_their_classes_names(
    models: tuple[str, str], storage: Storage
) -> None:
    found = compare(*(LabelSet.open(storage, uri) for uri in models))
    agreement, labels = found.agreement, found.drift.classes.labels
    assert agreement is not None
    assert labels == ["boot", "bag", "coat", "[bold]hat\x1b[31m"]
    assert (agreement.compared, int(agreement.same.sum())) == (6, 4)
    # One is an error row in the second; then the changed shard, and the shard that it doesn't have.
    assert (agreement.only_a, agreement.only_b) == (1 + 4 + 2, 1 + 4)
    assert (agreement.shards, agreement.changed_shards) == (2, 1)
    top = [(labels[a], labels[b], n) for a, b, n in agreement.disagreements.top(5)]
    assert top == [("bag", labels[3], 1), ("coat", labels[3], 1)]
    chance = (2 * 2 + 1 * 0 + 3 * 2 + 0 * 2) / 36
    assert agreement.kappa == pytest.approx((4 / 6 - chance) / (1 - chance))
    assert found.drift.count_a.tolist() == [6, 4, 3, 0]
    assert found.drift.count_b.tolist() == [6, 0, 3, 2]


def test_only_files_of_shards_that_both_have_in_one_version_are_opened(
    models: tuple[str, str], storage: Storage
) -> None:
    """The others aren't there to be opened, and are counted all the same."""
    before = compare(*(LabelSet.open(storage, uri) for uri in models)).totals
    files = [info.uri for uri in models for info in storage.list(f"{uri}/predictions")]
    for uri in files:
        if "changed.tar" in uri or "zz.tar" in uri:
            storage.delete(uri)
    assert compare(*(LabelSet.open(storage, uri) for uri in models)).totals == before


@pytest.mark.parametrize("what", ["newer", "gone"])
def test_labels_of_another_version_than_the_manifest_says_are_counted_and_not_compared(
    models: tuple[str, str], bucket: str, storage: Storage, what: str
) -> None:
    [uri] = [
        info.uri for info in storage.list(f"{models[0]}/predictions") if info.uri.endswith("/1.tar.parquet")
    ]
    if what == "newer":
        manifest = storage.read(f"{models[0]}/manifest.parquet")
        newer = {f"{bucket}/in/1.tar": make_predictions(f"{bucket}/in/1.tar", LABELS, [1, 1])}
        write_partition(storage, models[0], LABELS, [newer], versions={f"{bucket}/in/1.tar": "v2"})
        storage.write(f"{models[0]}/manifest.parquet", manifest)
    else:
        storage.delete(uri)
    agreement = compare(*(LabelSet.open(storage, uri) for uri in models)).agreement
    assert agreement is not None
    assert (agreement.shards, agreement.changed_shards, agreement.compared) == (1, 2, 4)
    assert (agreement.only_a, agreement.only_b) == (7 + 2, 5 + 2)


def test_a_copy_is_compared_as_what_was_copied(tmp_path: Path) -> None:
    """Its files have other versions than the manifest that was copied with them."""
    a, b, copy = (str(tmp_path / f"model={name}-00000000") for name in ("a", "b", "copy"))
    shard = {"/in/0.tar": make_predictions("/in/0.tar", LABELS, [0, 1, 2, 2])}
    write_partition(Storage(), a, LABELS, [shard])
    write_partition(
        Storage(), b, LABELS, [{"/in/0.tar": make_predictions("/in/0.tar", LABELS, [0, 1, 2, 1])}]
    )
    shutil.copytree(b, copy, copy_function=shutil.copyfile)
    for other in (b, copy):
        assert cvt_label(a, other, "--min-agreement", 0.75).exit_code == 0
        done = cvt_label(a, other, "--min-agreement", 0.76)
        assert done.exit_code == 7
        assert "agreement 0.75 is less than 0.76" in done.stderr


def test_what_is_no_prediction_file_is_named(models: tuple[str, str], storage: Storage) -> None:
    [uri] = [
        info.uri for info in storage.list(f"{models[0]}/predictions") if info.uri.endswith("/1.tar.parquet")
    ]
    storage.write(uri, b"of somebody else")
    done = cvt_label(*models)
    assert done.exit_code == 4
    assert "1.tar.parquet: not a prediction file" in done.stderr


def test_the_command_prints_it_writes_it_and_its_limits_set_the_status(
    models: tuple[str, str], bucket: str, storage: Storage
) -> None:
    done = cvt_label(*models, "--output", f"{bucket}/cmp.parquet", "--max-psi", "0.1", "--min-agreement", 0.9)
    assert done.exit_code == 7, done.stderr
    assert "66.7% of 6 images labeled in both" in done.stdout
    assert "matched by name: 1 only in A, 1 only in B" in done.stdout
    assert "[bold]hat" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert "is more than 0.1" in done.stderr
    assert "agreement 0.6667 is less than 0.9" in done.stderr
    table = pq.read_table(io.BytesIO(storage.read(f"{bucket}/cmp.parquet")))
    assert table.schema.equals(COMPARISON_SCHEMA)
    rows = {row["label"]: row for row in table.to_pylist()}
    assert (rows["bag"]["label_id_a"], rows["bag"]["label_id_b"]) == (1, None)
    assert (rows["coat"]["compared_a"], rows["coat"]["compared_b"], rows["coat"]["same"]) == (3, 2, 2)
    totals = json.loads(table.schema.metadata[TOTALS.encode()])
    assert (totals["compared"], totals["only_a"]) == (6, 7)
    assert sum(row["psi"] for row in table.to_pylist()) == pytest.approx(totals["psi"])
    parts = [row["js_divergence"] for row in table.to_pylist()]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(totals["js_distance"] ** 2)


def test_runs_of_one_partition_are_compared_by_the_labels_that_stand(bucket: str, storage: Storage) -> None:
    uri = f"{bucket}/out/model=a-00000000"
    days = [
        {f"{bucket}/in/{day}-{i}.tar": random_given(500, weights, seed=i) for i in range(2)}
        for day, weights in enumerate(([1, 1, 1], [1, 1, 1], [1, 6, 1]))
    ]
    made = [{shard: make_predictions(shard, LABELS, given) for shard, given in day.items()} for day in days]
    ids = write_partition(storage, uri, LABELS, [*made, made[0]])  # the last one labels the first's again
    calm = cvt_label(f"{uri}@{ids[1]}", f"{uri}@{ids[3]}", "--max-psi", 0.1, "--max-js", 0.1)
    assert calm.exit_code == 0, calm.stderr
    assert "1,000 in A, 1,000 in B" in calm.stdout
    drifted = compare(LabelSet.open(storage, f"{uri}@{ids[1]}"), LabelSet.open(storage, f"{uri}@{ids[2]}"))
    assert drifted.agreement is None
    assert drifted.drift.psi > 0.5
    assert LabelSet.open(storage, f"{uri}@latest").run == ids[3]
    assert LabelSet.open(storage, f"{uri}@previous").run == ids[2]
    gone = cvt_label(f"{uri}@{ids[0]}", uri)
    assert gone.exit_code == 4
    assert "labeled again since" in gone.stderr
    unknown = cvt_label(uri, f"{uri}@20260101T000000.000000Z-ffffff")
    assert unknown.exit_code == 4
    assert "there is no such run" in unknown.stderr
    limit = cvt_label(uri, f"{uri}@latest", "--min-agreement", 0.5)
    assert limit.exit_code == 4
    assert "no sample is labelled" in limit.stderr


def test_a_run_and_another_model_agree_on_the_shards_that_the_run_labelled(
    bucket: str, storage: Storage
) -> None:
    a, b = f"{bucket}/out/model=a-00000000", f"{bucket}/out/model=b-11111111"
    shards = [f"{bucket}/in/{i}.tar" for i in range(3)]
    made = [{shard: make_predictions(shard, LABELS, [i, 2])} for i, shard in enumerate(shards)]
    ids = write_partition(storage, a, LABELS, made)
    others = {shard: make_predictions(shard, LABELS, [1, 2]) for shard in shards}
    write_partition(storage, b, LABELS, [others])
    found = compare(LabelSet.open(storage, f"{a}@{ids[0]}"), LabelSet.open(storage, b))
    assert found.agreement is not None
    assert (found.agreement.compared, found.agreement.share, found.agreement.only_b) == (2, 0.5, 4)
    assert (found.drift.images_a, found.drift.images_b) == (2, 6)
    without = compare(LabelSet.open(storage, a), LabelSet.open(storage, b), with_agreement=False).table()
    assert without["same"].null_count == without.num_rows == 3


def test_what_is_no_partition_or_holds_nothing_is_named(bucket: str, storage: Storage) -> None:
    uri = f"{bucket}/out/model=a-00000000"
    write_partition(storage, uri, LABELS, [{f"{bucket}/x.tar": make_predictions("x", LABELS, [None])}])
    nowhere = cvt_label(uri, f"{bucket}/out")
    assert nowhere.exit_code == 4
    assert f"{bucket}/out: no labels of a model" in nowhere.stderr
    empty = cvt_label(uri, uri)
    assert empty.exit_code == 4
    assert "no image is labeled there" in empty.stderr
    assert cvt_label(uri, uri, "--drift-only", "--min-agreement", 1).exit_code == 2
