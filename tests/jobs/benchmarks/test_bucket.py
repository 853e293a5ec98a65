"""Tests of the bucket of the end-to-end benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.benchmarks.bucket import open_folder, upload
from pipeline.storage import Storage
from tests.makers import make_tar


@pytest.mark.slow
def test_folder_has_tars_and_files_and_is_deleted_at_the_end(
    bucket: str, storage: Storage, tmp_path: Path
) -> None:
    tars = [make_tar([(f"{tar}{i}.jpg", bytes([i])) for i in range(3)]) for tar in "ab"]
    for number, data in enumerate(tars):
        (tmp_path / f"{number}.tar").write_bytes(data)
    storage.write(f"{bucket}/folder/other", b"")
    with open_folder(f"{bucket}/folder/") as folder:
        assert folder.startswith(f"{bucket}/folder/")
        upload(tmp_path, f"{folder}/1", with_files=True)
        upload(tmp_path, f"{folder}/2", with_files=False)
        found = {info.uri.removeprefix(f"{folder}/"): storage.read(info.uri) for info in storage.list(folder)}
    assert found == {
        **{f"{job}/tars/{number}.tar": data for job in "12" for number, data in enumerate(tars)},
        **{f"1/files/{tar}{i}.jpg": bytes([i]) for tar in "ab" for i in range(3)},
    }
    assert [info.uri for info in storage.list(bucket)] == [f"{bucket}/folder/other"]
