"""SIGTERM and Ctrl-C end every command with status 130 at any moment, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cvt.checkpoints import BUNDLED
from pipeline.storage import Storage
from tests.makers import make_image, make_tar

pytestmark = pytest.mark.slow

#: Runs the command, and waits at the first audit event of Python whose kind and arguments contain the texts.
PAUSED = """\
import sys, time
kind, text, *sys.argv = sys.argv[1:]
def pause(event, args):
    if event == kind and text in str(args):
        print("paused", flush=True)
        time.sleep(60)
sys.addaudithook(pause)
from jobs.cli import main
main()
"""


@pytest.mark.parametrize(
    ("number", "event", "text", "command"),
    [
        (signal.SIGTERM, "import", "pipeline.publish", "label --config JOB --no-ray"),
        (signal.SIGINT, "import", "pipeline.publish", "label --config JOB --no-ray"),
        (signal.SIGTERM, "os.scandir", "/in'", "label --config JOB --no-ray"),
        (signal.SIGTERM, "os.rename", "report.html", "label --config JOB --no-ray"),
        (signal.SIGTERM, "open", "model.safetensors", "plan --config JOB --set model.path=BUCKET/model"),
        (signal.SIGTERM, "import", "torch", "convert BUCKET/model converted"),
        (signal.SIGTERM, "os.scandir", "/out'", "stats --config JOB"),
        (signal.SIGTERM, "os.scandir", "/out'", "publish --config JOB --to delta:table"),
    ],
    ids=["start", "start, Ctrl-C", "listing", "summaries", "download", "torch", "stats", "publish"],
)
def test_signal_ends_the_command_with_status_130(
    tmp_path: Path, bucket: str, storage: Storage, number: int, event: str, text: str, command: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(make_tar([("a.jpg", make_image())]))
    for file in BUNDLED["fashion-mnist"].iterdir():
        storage.write(f"{bucket}/model/{file.name}", file.read_bytes())
    (tmp_path / "out").mkdir()
    (tmp_path / "tmp").mkdir()
    job = tmp_path / "job.yaml"
    job.write_text(
        f"input: {{uri: {tmp_path}/in}}\nmodel: {{path: fashion-mnist}}\noutput: {{uri: {tmp_path}/out}}\n"
    )
    words = command.replace("JOB", str(job)).replace("BUCKET", bucket).split()
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, event, text, "cvt-label", *words],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "paused" in process.stdout.readline() or "paused" in process.stdout.read(), process.communicate()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert [path for path in (tmp_path / "tmp").iterdir() if "torchinductor" not in path.name] == []
    assert not (tmp_path / "converted").exists()
