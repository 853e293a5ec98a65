"""The gate: the exit status of a run reports drift from the previous run."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from jobs import label as label_command
from jobs.cli import make_app
from jobs.compare import compare
from jobs.console import add_command
from pipeline.config import Config, Selection, load_config
from pipeline.run import RunResult, label
from pipeline.statistics import limit_violations
from pipeline.storage import Storage
from tests.makers import make_tar
from tests.runs import IN_PROCESS, run_config

SAMPLE = Path(__file__).parents[3] / "jobs" / "data" / "fashion-mnist" / "test-0000.tar"
TROUSER, BAG = 1, 8


def write(root: Path, name: str, *classes: int, count: int = 20, skip: int = 0, folder: str = "in") -> None:
    """Writes a shard with `count` real images per class."""
    members = []
    with tarfile.open(SAMPLE) as tar:
        content = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    for class_id in classes:
        keys = [key[:-4] for key, data in content.items() if key.endswith(".cls") and int(data) == class_id]
        members += [(f"{key}.png", content[f"{key}.png"]) for key in keys[skip : skip + count]]
    Storage().write(f"{root}/{folder}/{name}", make_tar(members))


def config(root: Path, *overrides: str) -> Config:
    return run_config(root, "gate.max_psi=1", *overrides)


def run_with_gate(root: Path, *overrides: str, relabel: bool = False) -> RunResult:
    return label(config(root, *overrides), selection=Selection(relabel=relabel))


def record(result: RunResult) -> dict[str, object]:
    uri = f"{result.job.partition.uri}/runs/{result.run}.json"
    return dict(json.loads(Storage().read(uri)))


def test_similar_run_passes_the_gate_and_a_drifted_run_breaks_it(tmp_path: Path) -> None:
    write(tmp_path, "0.tar", TROUSER, BAG)
    first = run_with_gate(tmp_path)
    assert first.broken_limits == record(first)["broken_limits"] == []
    write(tmp_path, "1.tar", TROUSER, BAG, skip=20)
    second = run_with_gate(tmp_path)
    assert second.broken_limits == []
    write(tmp_path, "2.tar", BAG, count=30)
    third = run_with_gate(tmp_path)
    assert third.is_complete
    assert [text.split(" ")[0] for text in third.broken_limits] == ["PSI"]
    assert third.broken_limits[0].endswith("is more than 1")
    assert record(third)["broken_limits"] == third.broken_limits
    page = Storage().read(f"{third.job.partition.uri}/report.html").decode()
    assert third.broken_limits[0] in page
    drift = record(third)["drift"]
    assert isinstance(drift, dict)
    assert (drift["images_a"], drift["images_b"]) == (40, 30)
    assert drift["a"] == f"{third.job.partition.uri}@{second.run}"


def test_gate_result_stays_until_labels_or_limits_change(tmp_path: Path) -> None:
    write(tmp_path, "0.tar", TROUSER)
    run_with_gate(tmp_path)
    write(tmp_path, "1.tar", BAG)
    broken = run_with_gate(tmp_path).broken_limits
    assert len(broken) == 1
    assert run_with_gate(tmp_path).broken_limits == broken
    assert run_with_gate(tmp_path, "gate.max_psi=100").broken_limits == []
    assert run_with_gate(tmp_path, "gate.max_psi=100", "gate.max_js=0.5").broken_limits != []
    write(tmp_path, "2.tar", BAG, skip=20)
    assert run_with_gate(tmp_path).broken_limits == []


def test_first_run_and_small_run_are_not_gated(tmp_path: Path) -> None:
    write(tmp_path, "0.tar", TROUSER)
    run_with_gate(tmp_path)
    write(tmp_path, "1.tar", BAG)
    assert run_with_gate(tmp_path, "gate.min_images=21").broken_limits == []
    assert run_with_gate(tmp_path, "gate.min_images=20").broken_limits != []
    assert run_with_gate(tmp_path, relabel=True).broken_limits == []  # no label of an earlier run remains


def test_command_ends_with_7_even_with_unreadable_shards(tmp_path: Path) -> None:
    def cvt_label(*arguments: str) -> Result:
        app = make_app()
        add_command(app, label_command.label)
        settings = [f"input.uri={tmp_path}/in", f"output.uri={tmp_path}/out", *IN_PROCESS]
        sets = [f"--set={each}" for each in (*settings, "gate.max_js=0.9")]
        Path(tmp_path, "empty.yaml").write_text("{}")
        return CliRunner().invoke(app, [f"--config={tmp_path}/empty.yaml", *sets, *arguments])

    write(tmp_path, "0.tar", TROUSER)
    assert cvt_label().exit_code == 0
    write(tmp_path, "1.tar", BAG)
    Storage().write(f"{tmp_path}/in/bad.tar", b"no tar")
    done = cvt_label()
    assert done.exit_code == 7, done.output
    assert "drift from the previous run: Jensen-Shannon distance 1 is more than 0.9" in done.stderr
    assert "bad.tar" in done.stderr
    assert cvt_label("--set=gate.max_js=null").exit_code == 3


def test_compare_passes_with_a_single_run(tmp_path: Path) -> None:
    write(tmp_path, "0.tar", TROUSER)
    uri = run_with_gate(tmp_path).job.partition.uri
    app = make_app()
    add_command(app, compare)
    done = CliRunner().invoke(app, [f"{uri}@previous", f"{uri}@latest", "--max-psi", "0.1"])
    assert done.exit_code == 0
    assert "nothing to compare" in done.stderr


def test_limits_apply_to_the_totals_of_a_comparison() -> None:
    totals = {
        "images_a": 100, "images_b": 50, "psi": 0.3, "js_distance": 0.2, "score_psi": 0.1, "agreement": 0.8,
    }  # fmt: skip
    reached = {"max_psi": 0.3, "max_js": 0.2, "max_score_psi": 0.1, "min_agreement": 0.8}
    assert limit_violations(totals, reached) == []
    broken = {"max_psi": 0.29, "max_js": 0.19, "max_score_psi": 0.09, "min_agreement": 0.81}
    assert limit_violations(totals, broken) == [
        "PSI 0.3 is more than 0.29",
        "Jensen-Shannon distance 0.2 is more than 0.19",
        "PSI of the scores 0.1 is more than 0.09",
        "agreement 0.8 is less than 0.81",
    ]
    assert limit_violations(totals, {"max_psi": 0.1, "min_agreement": 0.9}, min_images=51) == [
        "agreement 0.8 is less than 0.9"
    ]
    assert limit_violations(totals | {"psi": float("nan")}, {"max_psi": 0.1}) != []


def test_datasets_in_one_output_are_gated_separately(tmp_path: Path) -> None:
    def label_dataset(name: str) -> RunResult:
        settings = [f"input.uri={tmp_path}/{name}", f"output.uri={tmp_path}/out", *IN_PROCESS]
        return label(load_config(Config, None, [*settings, "gate.max_psi=1"]))

    for night in range(2):
        for name, kind in (("shoes", TROUSER), ("bags", BAG)):
            write(tmp_path, f"{night}.tar", kind, skip=20 * night, folder=name)
            assert label_dataset(name).broken_limits == []
    write(tmp_path, "2.tar", BAG, folder="shoes")
    broken = label_dataset("shoes").broken_limits
    assert len(broken) == 1
    assert label_dataset("bags").broken_limits == []
    assert label_dataset("shoes").broken_limits == broken
    [page] = tmp_path.glob("out/model=*/report.html")
    assert page.read_text().count(broken[0]) == 1


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_interrupted_run_is_gated_together_with_its_resumption(tmp_path: Path, status: str) -> None:
    """Otherwise the second half of a drifted run would pass, because it resembles the first half."""
    write(tmp_path, "0.tar", TROUSER)
    run_with_gate(tmp_path)
    write(tmp_path, "1.tar", BAG)
    unfinished = run_with_gate(tmp_path)
    uri = f"{unfinished.job.partition.uri}/runs/{unfinished.run}.json"
    values = {
        name: value for name, value in record(unfinished).items() if name not in ("drift", "broken_limits")
    }
    Storage().write(uri, json.dumps(values | {"status": status}).encode())
    assert run_with_gate(tmp_path).broken_limits == unfinished.broken_limits  # there is nothing to label
    write(tmp_path, "2.tar", BAG, skip=20)
    result = run_with_gate(tmp_path)
    assert len(result.broken_limits) == 1
    drift = record(result)["drift"]
    assert isinstance(drift, dict)
    assert (drift["images_a"], drift["images_b"]) == (20, 40)
    write(tmp_path, "3.tar", BAG)
    assert run_with_gate(tmp_path).broken_limits == []
