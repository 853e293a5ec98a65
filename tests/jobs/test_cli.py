"""Tests of the command line: output and exit statuses."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import COMMANDS
from jobs.local_s3 import LocalS3
from pipeline.commit import Lease
from pipeline.config import Config, load_config
from pipeline.run import make_job
from pipeline.storage import Storage
from tests.command import cvt_label, cvt_label_process
from tests.makers import make_image, make_tar

JOB = """\
input: {{uri: "{input}"}}
model: {{path: fashion-mnist}}
output: {{uri: "{output}"}}
"""


@pytest.fixture
def job(tmp_path: Path, bucket: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(input=f"{bucket}/in", output=f"{bucket}/out"))
    return path


def test_help_lists_every_command() -> None:
    done = cvt_label("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert command in done.stdout


def test_help_imports_no_command() -> None:
    program = "from jobs.cli import make_cli; import sys; make_cli(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"jobs.console", "pyarrow", "pydantic", "boto3", "ray", "torch"}.intersection(
        done.stdout.split()
    )


def test_command_after_two_dashes_runs() -> None:
    done = cvt_label_process("--", "plan")
    assert done.returncode == 2
    assert "Missing option '--config'" in done.stderr


def help_pages() -> list[list[str]]:
    commands = [[name] for name in COMMANDS]
    return [[], *commands, *(["benchmark", name] for name in ("run", "model", "decoding"))]


@pytest.mark.parametrize("command", help_pages(), ids=" ".join)
def test_help_is_complete_at_80_columns(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = cvt_label(*command, "--help")
    assert done.returncode == 0
    usage, *lines = done.stdout.splitlines()
    assert usage.startswith("Usage: cvt-label")
    assert max(map(len, lines)) <= 80
    assert "..." not in "".join(lines)
    assert all(re.search(r"[.\])]$", paragraph) for paragraph in done.stdout.strip().split("\n\n")[1:])


def test_version_is_printed() -> None:
    assert cvt_label("--version").stdout == f"cvt-label {importlib.metadata.version('cvt-label')}\n"


def test_plan_counts_image_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(make_image(i))
    (tmp_path / "in" / ".hidden").write_bytes(b"")
    job = tmp_path / "job.yaml"
    job.write_text(JOB.format(input=tmp_path / "in", output=tmp_path / "out"))
    done = cvt_label("plan", "--config", job)
    assert "3 images: 3 new; 3 to label" in done.stdout
    assert "1 image group; " in done.stdout
    assert "1 object (hidden name: 1)" in done.stdout


def test_plan_names_at_most_100_ignored_objects_per_reason(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(make_image())
    for i in range(102):
        (tmp_path / "in" / f"{i:03d}.txt").touch()
    job = tmp_path / "job.yaml"
    job.write_text(JOB.format(input=tmp_path / "in", output=tmp_path / "out"))
    lines = cvt_label("plan", "--config", job, "--verbose").stdout.splitlines()
    ignored = [line for line in lines if line.startswith("ignored (other format): ")]
    assert len(ignored) == 101
    assert ignored[-1] == "ignored (other format): ... and 2 more"


def test_help_of_label_lists_exit_statuses() -> None:
    done = cvt_label("label", "--help")
    assert "Exit status" in done.stdout
    assert "--set" in done.stdout


def test_unknown_field_ends_with_2_and_is_named(job: Path) -> None:
    done = cvt_label("label", "--config", job, "--set", "output.topkk=3")
    assert done.returncode == 2
    assert "--set output.topkk=3: unknown field" in done.stderr
    assert "Traceback" not in done.stderr


def test_empty_prefix_ends_with_4_and_lists_formats(job: Path, bucket: str) -> None:
    done = cvt_label("label", "--config", job)
    assert done.returncode == 4
    assert f"input.uri: no shards found in {bucket}/in;" in done.stderr
    assert ".tar" in done.stderr


def test_missing_bucket_ends_with_4_and_is_named(job: Path) -> None:
    done = cvt_label("label", "--config", job, "--set", "input.uri=s3://no-such-bucket-here/in")
    assert done.returncode == 4
    assert "no-such-bucket-here" in done.stderr
    assert "does not exist" in done.stderr


def test_wrong_credentials_end_with_4(job: Path) -> None:
    done = cvt_label("label", "--config", job, AWS_SECRET_ACCESS_KEY="wrong")
    assert done.returncode == 4
    assert "the credentials were rejected" in done.stderr
    assert "wrong" not in done.stderr


def test_unreadable_model_ends_with_4_and_is_named(job: Path, bucket: str, storage: Storage) -> None:
    storage.write(f"{bucket}/in/a.tar", make_tar({"a.jpg": make_image()}))
    done = cvt_label("label", "--config", job, "--set", "model.path=/no/such/model")
    assert done.returncode == 4
    assert "model '/no/such/model': no such folder" in done.stderr


def test_unwritable_output_ends_with_4_before_labeling(job: Path, bucket: str, storage: Storage) -> None:
    storage.write(f"{bucket}/in/a.tar", make_tar({"a.jpg": make_image()}))
    done = cvt_label("label", "--config", job, "--set", "output.uri=s3://no-such-bucket-here/out")
    assert done.returncode == 4
    assert "no-such-bucket-here" in done.stderr
    assert "starting" not in done.stderr


def test_plan_lists_shards_and_writes_nothing(job: Path, bucket: str, storage: Storage) -> None:
    storage.write(f"{bucket}/in/a.tar", make_tar({"a.jpg": make_image()}))
    storage.write(f"{bucket}/in/b.jpg", make_image())
    storage.write(f"{bucket}/in/notes.txt", b"notes")
    done = cvt_label("plan", "--config", job, "--shards", "--verbose")
    assert done.returncode == 0, done.stderr
    assert "2 shards: 2 new; 2 to label" in done.stdout
    assert "1 image group, 1 tar shard; " in done.stdout
    assert f"ignored (other format): {bucket}/in/notes.txt" in done.stdout
    assert "1 object (other format: 1)" in done.stdout
    assert f"{bucket}/in/a.tar" in done.stdout
    assert f"{bucket}/out/model=fashion-mnist-" in done.stdout
    assert [o.uri for o in storage.list(f"{bucket}/out")] == []


def test_stats_of_missing_partition_ends_with_4(job: Path) -> None:
    done = cvt_label("stats", "--config", job)
    assert done.returncode == 4
    assert "no run has labeled with this model and these options" in done.stderr


@pytest.mark.slow
def test_label_then_stats_show_the_same_table(
    job: Path, bucket: str, storage: Storage, s3_server: LocalS3
) -> None:
    """The run ends with 3, because one shard is truncated."""
    whole = make_tar([(f"{i}.jpg", make_image(i)) for i in range(20)] + [("x.jpg", b"not an image")])
    storage.write(f"{bucket}/in/a.tar", whole)
    storage.write(f"{bucket}/in/cut.tar", whole[:3000])
    in_process = ["--config", job, "--set", "ray.address=in-process"]
    done = cvt_label_process("label", *in_process)
    assert done.returncode == 3, done.stderr
    assert "21 in 1 shard" in done.stdout
    assert f"not labeled: {bucket}/in/cut.tar" in done.stderr
    assert "2 of 2 shards, 21 images, 1 error" in done.stderr  # progress log
    assert re.search(rf"run \S+ labels 2 shards to {bucket}/out/model=fashion-mnist-", done.stderr)
    assert f"shard '{bucket}/in/a.tar', sample 20, key 'x': unsupported format: " in done.stderr
    assert "\x1b" not in done.stderr + done.stdout
    assert s3_server.secret_key not in done.stdout + done.stderr
    table = cvt_label("stats", "--config", job)
    assert table.returncode == 0, table.stderr
    assert table.stdout.partition("images ")[0] in done.stdout
    assert (
        "shards  1 labeled, 1 unreadable, 0 deleted from the input\nimages  21\nerrors  1\n" in table.stdout
    )
    repeated = cvt_label("label", *in_process)
    assert repeated.returncode == 3, repeated.stderr
    assert "1 done, 1 failed; 0 to label" in repeated.stdout
    assert "1 done, 1 failed; 0 to label" in repeated.stderr  # printed before the run starts
    assert "1 shard that could not be read before" in repeated.stderr
    assert (
        "1 done, 1 failed; 2 to label (2 reprocessed), 0 to prune"
        in cvt_label("plan", "--config", job, "--relabel", "--prune").stdout
    )
    assert cvt_label("stats", "--config", job, "--rebuild").stdout == table.stdout


@pytest.mark.slow
def test_held_lease_ends_with_5_or_waits(tmp_path: Path) -> None:
    """Another run holds the lease. Without --wait, 5. With --wait and SIGTERM, 130."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(make_tar([("a.jpg", make_image(1))]))
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(input=tmp_path / "in", output=tmp_path / "out"))
    partition = make_job(load_config(Config, path)).partition
    other = Lease(partition.storage, partition.uri, "other-run", 60)
    other.acquire()
    refused = cvt_label("label", "--config", path)
    assert refused.returncode == 5
    assert "run other-run" in refused.stderr
    waiting = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "label", "--config", str(path), "--wait"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stderr is not None
    assert any("run other-run" in line for line in iter(waiting.stderr.readline, ""))
    waiting.terminate()
    assert waiting.wait(300) == 130
    assert json.loads(partition.storage.read(f"{partition.uri}/lease.json"))["run"] == "other-run"
    other.release(clean_shutdown=True)


@pytest.mark.slow
def test_unreachable_ray_ends_with_4(job: Path, bucket: str, storage: Storage) -> None:
    storage.write(f"{bucket}/in/a.tar", make_tar([("a.jpg", make_image(1))]))
    done = cvt_label_process("label", "--config", job, "--set", "ray.address=127.0.0.1:1")
    assert done.returncode == 4
    assert "no Ray cluster answers at 127.0.0.1:1" in done.stderr
