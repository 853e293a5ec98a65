"""A run reports, and stops, when too many images or shards fail."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from jobs import label as label_command
from jobs.cli import make_app
from jobs.console import add_command
from pipeline.commit import Progress, new_run_id
from pipeline.config import LABEL_NEW, Selection, Share
from pipeline.run import PreparedRun, RunResult, label
from pipeline.storage import Storage
from tests.makers import make_image, make_tar
from tests.pipeline.run.test_gate import BAG, TROUSER
from tests.pipeline.run.test_gate import write as write_images
from tests.runs import IN_PROCESS, run_config

GOOD = make_image(1)
BAD = b"<html>"
RETRY = Selection(retry_errors=True)
SETTINGS = ("read.chunk_images=200", "report.gallery=0")


def write(root: Path, names: Iterable[str], image: bytes, count: int = 40) -> None:
    for name in names:
        members = [(f"{i:04d}.jpg", image) for i in range(count)]
        Storage().write(f"{root}/in/{name}.tar", make_tar(members))


def run(root: Path, *overrides: str, selection: Selection = LABEL_NEW) -> RunResult:
    return label(run_config(root, *SETTINGS, *overrides), selection)


def record(result: RunResult) -> dict[str, Any]:
    return result.partition.record(result.run)


def labeled(result: RunResult) -> int:
    """Returns the number of prediction files, each of which must be complete."""
    tables = list(result.partition.read_labels())
    assert all(table.num_rows == table["index"][-1].as_py() + 1 for table in tables)
    return len(tables)


def cvt_label(root: Path, *arguments: str) -> Result:
    app = make_app()
    add_command(app, label_command.label)
    settings = [f"input.uri={root}/in", f"output.uri={root}/out", *IN_PROCESS, *SETTINGS]
    Path(root, "empty.yaml").write_text("{}")
    sets = [f"--set={each}" for each in settings]
    return CliRunner().invoke(app, [f"--config={root}/empty.yaml", *sets, *arguments])


def test_run_without_labels_is_not_green_until_its_failures_are_gone(tmp_path: Path) -> None:
    write(tmp_path, ["0", "1"], BAD, 50)
    done = cvt_label(tmp_path)
    assert done.exit_code == 8, done.output
    message = "100 of 100 images (100.0%) failed, mostly unsupported format; the limit "
    assert f"{message}gate.max_error_fraction is 0.5" in done.stderr
    [page] = tmp_path.glob("out/model=*/report.html")
    assert "Failures of this run" in page.read_text()
    assert cvt_label(tmp_path, "--set=gate.max_error_fraction=null").exit_code == 0
    assert cvt_label(tmp_path).exit_code == 8  # nothing new
    assert cvt_label(tmp_path, "--retry-errors").exit_code == 8  # nothing changed
    write(tmp_path, ["2"], GOOD)
    assert cvt_label(tmp_path).exit_code == 0  # judged by its own images


def test_run_that_finds_only_empty_shards_is_not_green(tmp_path: Path) -> None:
    for name in "01":
        Storage().write(f"{tmp_path}/in/{name}.tar", bytes(10_240))
    done = cvt_label(tmp_path)
    assert done.exit_code == 8, done.output
    assert "no image found: 2 of 2 shards are empty" in done.stderr
    assert cvt_label(tmp_path).exit_code == 8  # nothing new
    assert cvt_label(tmp_path, "--relabel").exit_code == 8  # nothing changed
    assert cvt_label(tmp_path, "--set=gate.max_unreadable_fraction=null").exit_code == 0
    write(tmp_path, ["2"], GOOD, 1)
    Storage().write(f"{tmp_path}/in/3.tar", bytes(10_240))
    assert cvt_label(tmp_path).exit_code == 0


def test_empty_shard_does_not_hide_unreadable_ones(tmp_path: Path) -> None:
    for name, content in {"0": bytes(10_240), "1": b"not a tar", "2": b"not a tar"}.items():
        Storage().write(f"{tmp_path}/in/{name}.tar", content)
    [message] = run(tmp_path).broken_failure_limits
    assert message.startswith("2 of 3 shards (66.7%) cannot be read")


def test_retry_that_succeeds_recovers(tmp_path: Path) -> None:
    write(tmp_path, ["0"], BAD.ljust(len(GOOD), b"\0"))
    path = tmp_path / "in/0.tar"
    times = path.stat().st_mtime_ns
    first = run(tmp_path)
    assert len(first.broken_failure_limits) == 1
    assert record(first)["failures"] == {
        "images": 40,
        "errors": 40,
        "unsupported format": 40,
        "shards": 1,
    }
    path.write_bytes(make_tar([(f"{i:04d}.jpg", GOOD) for i in range(40)]))
    os.utime(path, ns=(times, times))  # the same version: whatever failed works now
    assert len(run(tmp_path).broken_failure_limits) == 1
    retried = run(tmp_path, selection=RETRY)
    assert (retried.totals.images, retried.broken_failure_limits) == (40, [])
    assert run(tmp_path).broken_failure_limits == []


@pytest.mark.parametrize("others", ["shares", "datasets"])
def test_limit_stays_broken_after_many_runs_of_others(tmp_path: Path, others: str) -> None:
    write(tmp_path, ["0", "1"], BAD, 50)
    mine = f"run.share={next(i for i in (1, 2) if Share(i, 2).contains(f'{tmp_path}/in/0.tar'))}/2"
    first = run(tmp_path, mine)
    assert first.broken_failure_limits
    other = record(first) | {"failures": {}, "broken_failure_limits": []}
    if others == "shares":
        other["config"]["run"]["share"] = "1/2" if mine.endswith("2/2") else "2/2"
    else:
        other["config"]["input"]["uri"] = f"{tmp_path}/other"
    for _ in range(150):
        name = new_run_id()
        Storage().write(f"{first.partition.uri}/runs/{name}.json", json.dumps(other | {"run": name}).encode())
    assert run(tmp_path, mine).broken_failure_limits == first.broken_failure_limits


def test_shards_that_fail_again_do_not_break_a_limit_that_they_did_not_break(tmp_path: Path) -> None:
    write(tmp_path, map(str, range(9)), GOOD)
    write(tmp_path, ["9"], BAD)
    assert run(tmp_path).broken_failure_limits == []
    retried = run(tmp_path, selection=RETRY)
    assert (retried.totals.images, retried.totals.errors) == (40, 40)
    assert retried.broken_failure_limits == []
    assert run(tmp_path).broken_failure_limits == []


def test_images_that_fail_since_a_retry_break_the_limit(tmp_path: Path) -> None:
    members = [(f"{i:04d}.jpg", BAD.ljust(len(GOOD), b"\0") if i < 9 else GOOD) for i in range(40)]
    path = tmp_path / "in/0.tar"
    Storage().write(str(path), make_tar(members))
    times = path.stat().st_mtime_ns
    assert run(tmp_path).broken_failure_limits == []
    path.write_bytes(make_tar([(name, BAD.ljust(len(GOOD), b"\0")) for name, _ in members]))
    os.utime(path, ns=(times, times))
    [message] = run(tmp_path, selection=RETRY).broken_failure_limits
    assert message.startswith("31 of 40 images")


def test_run_stops_when_the_limit_is_certainly_broken(tmp_path: Path) -> None:
    names = [f"{i:02d}" for i in range(30)]
    write(tmp_path, names, BAD)
    result = run(tmp_path)
    done = labeled(result)
    assert result.aborted
    assert 10 <= done < 25  # of 30; up to nine writes are pending
    assert record(result)["status"] == "aborted"
    assert record(result)["counts"]["images"] == 40 * done
    assert not result.is_complete
    finished = cvt_label(tmp_path, "--set=gate.abort=false")
    assert finished.exit_code == 8
    assert f"{done} done" in finished.stderr
    assert labeled(result) == 30


def test_one_bad_shard_does_not_stop_the_run(tmp_path: Path) -> None:
    """The first thousand results may all be errors of one shard."""
    write(tmp_path, ["bad"], BAD, 1000)
    write(tmp_path, [f"{i:02d}" for i in range(12)], GOOD, 5)
    result = run(tmp_path, "gate.max_error_fraction=0.99")
    assert (result.aborted, labeled(result)) == (False, 13)


def test_unreadable_shards_break_their_own_limit(tmp_path: Path) -> None:
    write(tmp_path, ["0", "1"], GOOD)
    for name in ("2", "3", "4"):
        Storage().write(f"{tmp_path}/in/{name}.tar", b"not a tar")
    done = cvt_label(tmp_path)
    assert done.exit_code == 8
    message = "3 of 5 shards (60.0%) cannot be read; the limit gate.max_unreadable_fraction is 0.5"
    assert message in done.stderr
    assert cvt_label(tmp_path).exit_code == 8
    assert cvt_label(tmp_path, "--set=gate.max_unreadable_fraction=0.6").exit_code == 3


def test_canary_with_failures_keeps_the_other_shards_unlabeled(tmp_path: Path) -> None:
    write(tmp_path, map(str, range(8)), BAD, 5)
    result = run(tmp_path, "gate.canary=2")
    assert (result.aborted, labeled(result), result.totals.images) == (True, 2, 10)
    assert len(result.broken_failure_limits) == 1
    assert cvt_label(tmp_path, "--set=gate.canary=2").exit_code == 8
    assert labeled(result) == 4


def test_canary_that_passes_is_followed_by_the_other_shards(tmp_path: Path) -> None:
    write(tmp_path, map(str, range(8)), GOOD, 5)
    result = run(tmp_path, "gate.canary=3")
    assert (result.aborted, labeled(result), result.totals.shards) == (False, 8, 8)
    rows = result.partition.manifest.read(["uri", "committed_at"]).to_pylist()
    assert len({row["committed_at"] for row in rows}) > 1


def test_canary_that_drifts_keeps_the_other_shards_unlabeled(tmp_path: Path) -> None:
    write_images(tmp_path, "0.tar", TROUSER)
    run(tmp_path)
    for name in "123456":
        write_images(tmp_path, f"{name}.tar", BAG, count=3)
    drifted = run(tmp_path, "gate.canary=2", "gate.max_js=0.5")
    assert (drifted.aborted, labeled(drifted), len(drifted.broken_limits)) == (True, 3, 1)
    assert run(tmp_path, "gate.canary=2", "gate.max_js=0.5").broken_limits != []
    assert run(tmp_path, "gate.canary=2").is_complete


def mark_interrupted(result: RunResult) -> None:
    content = json.dumps(record(result) | {"status": "interrupted"}).encode()
    Storage().write(f"{result.partition.uri}/runs/{result.run}.json", content)


def test_failures_of_a_stopped_run_count_for_the_run_that_continues_it(tmp_path: Path) -> None:
    write(tmp_path, ["0"], BAD)
    mark_interrupted(run(tmp_path))
    write(tmp_path, ["1"], GOOD, 10)
    [message] = run(tmp_path).broken_failure_limits
    assert message.startswith("40 of 50 images")


def test_failures_of_two_stopped_runs_count_once(tmp_path: Path) -> None:
    write(tmp_path, ["0"], BAD, 9)
    mark_interrupted(run(tmp_path))

    def stop(progress: Progress, prepared: PreparedRun) -> None:
        if progress.shards:
            raise KeyboardInterrupt

    write(tmp_path, ["1"], GOOD, 10)
    with pytest.raises(KeyboardInterrupt):
        label(run_config(tmp_path, *SETTINGS), on_progress=stop)
    write(tmp_path, ["2"], GOOD, 5)
    last = run(tmp_path)
    assert last.broken_failure_limits == []
    counts = record(last)["failures"]
    assert (counts["images"], counts["errors"], counts["shards"]) == (24, 9, 3)


def test_stopped_relabel_of_good_shards_does_not_count_for_the_next_run(tmp_path: Path) -> None:
    write(tmp_path, ["0", "1"], GOOD)
    run(tmp_path)

    def stop(progress: Progress, prepared: PreparedRun) -> None:
        if progress.shards:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(run_config(tmp_path, *SETTINGS), Selection(relabel=True), on_progress=stop)
    write(tmp_path, ["2"], BAD, 10)
    [message] = run(tmp_path).broken_failure_limits
    assert message.startswith("10 of 10 images")


def test_run_that_fails_after_its_canary_counts_with_all_its_shards(tmp_path: Path) -> None:
    """Its record has the failures also before the end of the run, since a run may be killed."""
    write(tmp_path, map(str, range(8)), BAD, 5)

    def stored() -> dict[str, Any]:
        [path] = tmp_path.glob("out/model=*/runs/*.json")
        return dict(json.loads(path.read_bytes()))

    def stop(progress: Progress, prepared: PreparedRun) -> None:
        if progress.shards >= 4:
            assert (stored()["status"], stored()["failures"]["errors"]) == ("running", 10)  # the canary
            raise RuntimeError("stopped by the test")

    config = run_config(tmp_path, *SETTINGS, "gate.canary=2", "gate.max_error_fraction=null")
    with pytest.raises(RuntimeError, match="stopped by the test"):
        label(config, on_progress=stop)
    assert stored()["status"] == "failed"
    assert stored()["failures"]["errors"] == 5 * stored()["counts"]["shards"] >= 20
    [message] = run(tmp_path).broken_failure_limits
    assert message.startswith("40 of 40 images")
