"""Temporary folders are private, and a later run removes those of killed processes only."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.storage import temporary_folder

HOLD = """\
import sys
from pipeline.storage import temporary_folder
with temporary_folder(sys.argv[1]) as folder:
    (folder / "weights").write_bytes(b"w")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_folder_is_private_and_removed(tmp_path: Path) -> None:
    with temporary_folder(tmp_path) as folder:
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "weights").write_bytes(b"w")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "is_kept"), [(FileNotFoundError, True), (ValueError, True), (KeyboardInterrupt, False)]
)
def test_folder_is_kept_after_errors_if_requested(
    tmp_path: Path, error: type[BaseException], is_kept: bool
) -> None:
    for keep, expected in ((False, False), (True, is_kept)):
        with pytest.raises(error), temporary_folder(tmp_path, keep_on_error=keep) as folder:
            raise error
        assert folder.exists() == expected
    with temporary_folder(tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_only_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        held = Path(process.stdout.readline().strip())
        (tmp_path / "cvt-label-tmp-link").symlink_to(tmp_path / "models")
        (tmp_path / "models").mkdir()
        with temporary_folder(tmp_path):
            assert (held / "weights").exists()
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert (held / "weights").exists()
    with temporary_folder(tmp_path):
        assert not held.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cvt-label-tmp-link", "models"]
