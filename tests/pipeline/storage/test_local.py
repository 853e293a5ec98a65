"""Behavior that is specific to local files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.storage import ObjectChanged, ObjectNotFound, Storage, StorageError, normalize_uri
from tests.pipeline.storage.operations import names


def test_listing_is_bytewise_and_follows_links_without_cycles(storage: Storage, tmp_path: Path) -> None:
    files = ["a/1", "a-b/2", "a.tar", "B", "ü", "z/y/x"]
    root = tmp_path / "root"
    for name in files:
        storage.write(f"{root}/{name}", b"x")
    (root / "z" / "back").symlink_to(root)
    (root / "dead.tar").symlink_to(tmp_path / "gone")
    outside = storage.write(f"{tmp_path}/outside/in.tar", b"x")
    (root / "linked").symlink_to(tmp_path / "outside")
    found = [uri.removeprefix(f"{root}/") for uri in names(storage, str(root))]
    assert found == sorted([*files, "dead.tar", "linked/in.tar"], key=str.encode)
    with pytest.raises(ObjectNotFound):
        storage.read(f"{root}/dead.tar", "0-0")
    assert storage.read(outside.uri) == b"x"


def test_entries_that_cannot_be_read_are_listed_and_reading_names_the_cause(
    storage: Storage, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "loop.tar").symlink_to(root / "loop.tar")
    os.mkfifo(root / "pipe.jpg")
    (root / "zero.jpg").symlink_to("/dev/zero")
    Path(os.fsdecode(bytes(root) + b"/\xff.tar")).write_bytes(b"x")
    storage.write(f"{root}/good.tar", b"x")
    causes = {}
    for info in storage.list(str(root)):
        try:
            storage.read(info.uri, info.version)
        except StorageError as error:
            causes[info.uri.removeprefix(f"{root}/")] = error.cause
    assert causes == {
        "loop.tar": "Too many levels of symbolic links",
        "pipe.jpg": "not a regular file",
        "zero.jpg": "not a regular file",
        "\\xff.tar": "the file's name is not UTF-8: rename the file",
    }
    with pytest.raises(StorageError, match="not a file or folder"):
        list(storage.list(f"{root}/pipe.jpg"))


def test_local_paths_are_normalized(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = storage.write(normalize_uri(f"file://{tmp_path}/with%20space/x"), b"x")
    assert info.uri == f"{tmp_path}/with space/x"
    monkeypatch.chdir(tmp_path)
    assert names(storage, normalize_uri("with space/../with space/")) == [info.uri]
    assert storage.stat(normalize_uri("with space/x")) == info


def test_failed_write_leaves_no_temporary_file(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").mkdir()  # a file cannot replace a folder
    with pytest.raises(StorageError, match=f"{tmp_path}/x.parquet: "):
        storage.write(f"{tmp_path}/x.parquet", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


def test_readers_see_only_complete_files(storage: Storage, tmp_path: Path) -> None:
    contents = [b"a" * 3_000_000, b"b" * 2_000_000]
    storage.write(f"{tmp_path}/x.parquet", contents[0])
    done = threading.Event()

    def write() -> None:
        for i in range(20):
            storage.write(f"{tmp_path}/x.parquet", contents[i % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        found = list(tmp_path.glob("**/*.parquet"))
        assert [path.name for path in found] == ["x.parquet"]
        data = found[0].read_bytes()
        assert data in contents
        seen.add(data[:1])
    writer.join()
    assert seen


def test_writes_at_the_same_time_have_different_versions(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:  # the last call before the version is read: stops the clock
        os.utime(descriptor, ns=(10**18, 10**18))

    monkeypatch.setattr(os, "fsync", fsync)
    for expected in (None, "previous"):
        written = [storage.write(f"{tmp_path}/x", b"0")]
        for i in range(1, 10):
            written.append(storage.write(f"{tmp_path}/x", b"%d" % i, expected and written[-1].version))
            assert storage.stat(f"{tmp_path}/x") == written[-1]
        assert len({info.version for info in written}) == 10
        with pytest.raises(ObjectChanged):
            storage.read(f"{tmp_path}/x", written[-2].version)


#: Starts a write that never ends.
_WRITER = """
import io, sys, time
from pipeline.storage import Storage

class Endless(io.BytesIO):
    def read(self, size=-1):
        data = super().read(size)
        if not data:
            time.sleep(600)
        return data

Storage().write(sys.argv[1], Endless(b"half of it" * 10_000))
"""


def test_only_temporary_files_of_killed_writers_are_removed(storage: Storage, tmp_path: Path) -> None:
    storage.write(f"{tmp_path}/deep/x.parquet", b"x")
    (tmp_path / "deep" / ".hidden.tmp").write_bytes(b"of another program")
    command = [sys.executable, "-c", _WRITER, f"{tmp_path}/deep/y.parquet"]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path.cwd())}) as writer:
        try:
            until = time.monotonic() + 60
            while not any(path.stat().st_size for path in _unfinished(tmp_path)):
                assert time.monotonic() < until
                time.sleep(0.02)
            storage.remove_unfinished_writes(str(tmp_path))
            assert len(_unfinished(tmp_path)) == 1
        finally:
            writer.kill()
    storage.remove_unfinished_writes(str(tmp_path))
    assert not _unfinished(tmp_path)
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"x.parquet", ".hidden.tmp"}


def test_removal_of_unfinished_writes_spares_running_writes(storage: Storage, tmp_path: Path) -> None:
    done = threading.Event()

    def remove() -> None:
        while not done.is_set():
            storage.remove_unfinished_writes(str(tmp_path))

    removers = [threading.Thread(target=remove) for _ in range(3)]
    for remover in removers:
        remover.start()
    try:
        for number in range(200):
            storage.write(f"{tmp_path}/{number}", b"x")
    finally:
        done.set()
        for remover in removers:
            remover.join()
    assert len(list(tmp_path.iterdir())) == 200


def test_removal_in_a_missing_folder_does_nothing(storage: Storage, tmp_path: Path) -> None:
    storage.remove_unfinished_writes(f"{tmp_path}/nowhere")
    assert not (tmp_path / "nowhere").exists()


def _unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*.tmp") if path.name != ".hidden.tmp"]


def test_missing_folder_is_an_error_when_required(storage: Storage, tmp_path: Path) -> None:
    assert list(storage.list(f"{tmp_path}/nowhere")) == []
    with pytest.raises(ObjectNotFound, match="nowhere: no such file or folder"):
        list(storage.list(f"{tmp_path}/nowhere", missing_ok=False))
