"""Tests of reruns from a run record: same configuration, and same commit of a hub model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cvt.checkpoints import BUNDLED
from jobs.cli import make_app
from jobs.console import add_command
from jobs.label import label
from jobs.plan import plan
from pipeline.config import Config, load_config
from pipeline.storage import Storage
from tests.makers import make_image, make_tar

COMMITS = ("0" * 40, "1" * 40)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A configuration whose input has two shards."""
    (tmp_path / "in").mkdir()
    for i in range(2):
        (tmp_path / "in" / f"{i}.tar").write_bytes(make_tar([("0.jpg", make_image(i)), ("1.jpg", b"bad")]))
    values = {
        "input": {"uri": f"{tmp_path}/in"},
        "model": {"path": "fashion-mnist"},
        "output": {"uri": f"{tmp_path}/out"},
        "ray": {"address": "in-process"},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(values))  # JSON is YAML
    return tmp_path / "job.yaml"


def run(command: str, config: Path, *options: str, status: int = 0) -> Result:
    app = make_app()
    add_command(app, label)
    add_command(app, plan)
    done = CliRunner().invoke(app, [command, "--config", str(config), *options])
    assert done.exit_code == status, done.output
    return done


def last_record(job: Path) -> tuple[Path, dict[str, Any]]:
    path = max(job.parent.glob("out/model=*/runs/*.json"), key=lambda path: path.name)
    return path, json.loads(path.read_text())


@pytest.mark.slow
def test_run_from_record_with_its_recorded_options_repeats_the_run(job: Path) -> None:
    run("label", job)
    run("label", job, "--relabel", "--prune")
    record, values = last_record(job)
    assert values["selection"] == {"retry_errors": False, "relabel": True, "prune": True}
    (job.parent / "in" / "1.tar").unlink()
    assert "0 to label" in run("plan", record).output
    assert "1 to label (1 reprocessed), 1 to prune" in run("plan", record, "--relabel", "--prune").output
    run("label", record, "--relabel", "--prune")
    other_record, repeated = last_record(job)
    assert other_record != record
    assert repeated["selection"] == values["selection"]
    assert repeated["counts"] == values["counts"] | {
        "shards": 1, "images": 1 + 1, "errors": 1, "pruned_shards": 1,
    }  # fmt: skip


def test_errors_are_reported_and_second_run_labels_nothing(
    job: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert re.search(r"^errors +2 \(listed in the report\)$", run("label", job).output, re.M)
    assert "labels 2 shards to" in caplog.text
    caplog.clear()
    assert "0 to label" in run("label", job).output
    assert " shards to" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("location", ["local", "bucket"])
def test_commands_that_label_nothing_import_no_torch(
    job: Path, bucket: str, storage: Storage, location: str
) -> None:
    options: list[str] = []
    if location == "bucket":
        for file in BUNDLED["fashion-mnist"].iterdir():
            storage.write(f"{bucket}/clothes/{file.name}", file.read_bytes())
        options = ["--set", f"model.path={bucket}/clothes"]
    run("label", job, *options)
    code = (
        "import atexit, sys\n"
        "from jobs.cli import main\n"
        "heavy = {'torch', 'transformers', 'ray', 'huggingface_hub'}\n"
        f"heavy |= {{'boto3', 'botocore'}} if {location == 'local'} else set()\n"
        "atexit.register(lambda: print(heavy & {*sys.modules}))\n"
        "main()\n"
    )
    for command in ("plan", "label", "stats", "report"):
        arguments = [sys.executable, "-c", code, command, "--config", str(job), *options]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("set()\n"), command


def test_outdated_cache_ends_the_run_before_a_label_is_written(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = re.search(r"^output +(.*)$", run("plan", job).output, re.M)
    (entry,) = tmp_path.glob("cache/cvt-label/checkpoints/*.json")
    content = json.loads(entry.read_text())
    content["checkpoint"]["known_digest"] = "0" * 64
    entry.write_text(json.dumps(content))
    message = run("label", job, status=4).output
    assert "model 'fashion-mnist': its files have changed since the command started" in message
    assert [*tmp_path.glob("out/**/*.parquet")] == []
    run("label", job)  # the failed run has replaced the entry
    assert output is not None
    written = [*tmp_path.glob("out/**/predictions/**/*.parquet")]
    assert len(written) == 2
    assert all(file.is_relative_to(output[1]) for file in written)


def test_run_that_fails_while_planning_records_its_selection(job: Path) -> None:
    run("label", job)
    stray = next(job.parent.glob("out/model=*/predictions")) / "stray.parquet"
    stray.write_bytes(b"not Parquet")  # makes planning fail
    run("label", job, "--relabel", status=4)
    _, values = last_record(job)
    assert values["status"] == "failed"
    assert values["selection"] == {"retry_errors": False, "relabel": True, "prune": False}


def test_rerun_uses_the_recorded_commit_of_a_hub_model(
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
    branch.write_text(COMMITS[1])  # a new commit on the branch
    assert "2 new" in run("plan", job, "--set", "model.path=someone/clothes").output
    assert "2 done" in run("plan", record).output
    run("label", record, "--relabel")
    other_record, repeated = last_record(job)
    assert repeated["fingerprint"] == values["fingerprint"]
    assert repeated["model_commit"] == repeated["config"]["model"]["revision"] == COMMITS[0]
    assert "2 done" in run("plan", other_record).output
    # An override of model or revision wins over the record.
    assert "fashion-mnist" in run("plan", record, "--set", "model.path=fashion-mnist").output
    overrides = ["model.path=someone/clothes", "model.revision=main"]
    assert "2 new" in run("plan", record, "--set", overrides[0], "--set", overrides[1]).output


def test_record_has_no_commit_for_a_local_model(job: Path) -> None:
    run("label", job)
    record, values = last_record(job)
    assert values["model_commit"] is None
    assert load_config(Config, record) == load_config(Config, job)
