"""Runs that are repeated from a run's record: the same selection, and of a hub's model the same commit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cvt.checkpoints import BUNDLED
from jobs.console import make_app
from jobs.label import label
from jobs.plan import plan
from pipeline.config import Config, load_config
from tests.makers import make_image, make_tar

COMMITS = ("0" * 40, "1" * 40)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A configuration, with two shards."""
    (tmp_path / "in").mkdir()
    for i in range(2):
        (tmp_path / "in" / f"{i}.tar").write_bytes(make_tar([("0.jpg", make_image(i)), ("1.jpg", b"bad")]))
    values = {
        "input": {"uri": f"{tmp_path}/in"},
        "model": {"path": "fashion-mnist"},
        "output": {"uri": f"{tmp_path}/out"},
        "ray": {"address": "in-process"},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(values))  # which is YAML, too
    return tmp_path / "job.yaml"


def run(command: str, config: Path, *options: str, status: int = 0) -> Result:
    app = make_app()
    app.command()(label)
    app.command()(plan)
    done = CliRunner().invoke(app, [command, "--config", str(config), *options])
    assert done.exit_code == status, done.output
    return done


def last_record(job: Path) -> tuple[Path, dict[str, Any]]:
    path = max(job.parent.glob("out/model=*/runs/*.json"), key=lambda path: path.name)
    return path, json.loads(path.read_text())


@pytest.mark.slow
def test_a_run_from_a_record_selects_what_that_run_had_selected_and_says_so(job: Path) -> None:
    run("label", job)
    run("label", job, "--relabel", "--prune")
    record, values = last_record(job)
    assert values["selection"] == {"retry_errors": False, "relabel": True, "prune": True}
    (job.parent / "in" / "1.tar").unlink()
    said = run("plan", record).output
    assert f"as run {values['run']} had it: --relabel --prune (--no-relabel --no-prune leaves it out)" in said
    assert "1 to label (1 of them again), 1 to prune" in said
    run("label", record)
    again, repeated = last_record(job)
    assert again != record
    assert repeated["selection"] == values["selection"]
    assert repeated["counts"] == values["counts"] | {
        "shards": 1, "images": 1 + 1, "errors": 1, "pruned_shards": 1,
    }  # fmt: skip


def test_options_go_before_what_is_recorded(job: Path) -> None:
    run("label", job, "--relabel", "--retry-errors")
    record, _ = last_record(job)
    said = run("plan", record, "--no-relabel", "--prune", "--no-retry-errors").output
    assert "as run" not in said
    assert "0 to label, 0 to prune" in said
    assert "2 to label (2 of them again)" in run("plan", record, "--no-relabel").output


def test_a_run_that_died_before_it_knew_what_to_do_has_left_what_it_was_asked_for(job: Path) -> None:
    run("label", job)
    stray = next(job.parent.glob("out/model=*/predictions")) / "stray.parquet"
    stray.write_bytes(b"no Parquet")  # ends it while it plans
    run("label", job, "--relabel", status=4)
    record, values = last_record(job)
    assert values["status"] == "failed"
    stray.unlink()
    assert "2 to label (2 of them again)" in run("plan", record).output


def test_a_record_of_an_earlier_version_selects_nothing_more(job: Path) -> None:
    run("label", job, "--relabel")
    record, values = last_record(job)
    for name in ("selection", "model_commit"):
        del values[name]
    record.write_text(json.dumps(values))
    assert "0 to label" in run("plan", record).output


def test_a_model_of_the_hub_is_the_commit_that_the_run_used(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--someone--clothes"
    for i, commit in enumerate(COMMITS):
        folder = shutil.copytree(BUNDLED["fashion-mnist"], repository / "snapshots" / commit)
        config = json.loads((folder / "config.json").read_text())
        config["id2label"] = {key: f"{name} {i}" for key, name in config["id2label"].items()}
        config["label2id"] = {name: int(key) for key, name in config["id2label"].items()}
        (folder / "config.json").write_text(json.dumps(config))
    (repository / "refs").mkdir()
    branch = repository / "refs" / "main"
    branch.write_text(COMMITS[0])
    run("label", job, "--set", "model.path=someone/clothes@main")
    record, values = last_record(job)
    assert (values["model_commit"], values["config"]["model"]["revision"]) == (COMMITS[0], None)
    branch.write_text(COMMITS[1])  # somebody has pushed
    assert "2 new" in run("plan", job, "--set", "model.path=someone/clothes").output
    assert "2 done" in run("plan", record).output
    run("label", record, "--relabel")
    again, repeated = last_record(job)
    assert repeated["fingerprint"] == values["fingerprint"]
    assert repeated["model_commit"] == repeated["config"]["model"]["revision"] == COMMITS[0]
    assert "2 done" in run("plan", again, "--no-relabel").output
    # Another model, or revision, is the one that is named.
    assert "fashion-mnist" in run("plan", record, "--set", "model.path=fashion-mnist").output
    asked = ["model.path=someone/clothes", "model.revision=main"]
    assert "2 new" in run("plan", record, "--set", asked[0], "--set", asked[1]).output


def test_no_commit_is_recorded_of_a_model_that_is_none_of_the_hubs(job: Path) -> None:
    run("label", job)
    record, values = last_record(job)
    assert values["model_commit"] is None
    assert load_config(Config, record) == load_config(Config, job)
