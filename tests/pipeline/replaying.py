"""Replays crashes: the output of a run that is killed at a storage write, without killing a run.

A run is recorded: the output after each of its writes equals the output of a run that dies there.
"""

from __future__ import annotations

import io
import json
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.config import LABEL_NEW, Config, Selection, load_config
from pipeline.run import label, make_job, rebuild
from pipeline.storage import ObjectNotFound, Storage
from tests.pipeline import crashing
from tests.pipeline.crashing import Crash
from tests.runs import run_fields

#: An output: a copy of a folder, or the objects of a bucket.
Snapshot = Path | dict[str, bytes]


class Place:
    """Input and output of a job, in a folder or a bucket; the output can be restored to an earlier state."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.storage = Storage()

    def objects(self, folder: str) -> dict[str, bytes]:
        """Returns the content of all objects in a folder, by relative name."""
        try:
            found = [info.uri for info in self.storage.list(f"{self.root}/{folder}")]
        except ObjectNotFound:
            return {}
        return {uri.removeprefix(f"{self.root}/{folder}/"): self.storage.read(uri) for uri in found}

    def put(self, folder: str, objects: dict[str, bytes]) -> None:
        """Sets the objects of a folder; does not write objects that are equal already."""
        current = self.objects(folder)
        for name in current.keys() - objects.keys():
            self.storage.delete(f"{self.root}/{folder}/{name}")
        for name, data in objects.items():
            if current.get(name) != data:
                self.storage.write(f"{self.root}/{folder}/{name}", data)

    def snapshot(self, name: str = "kept") -> Snapshot:
        """Returns the current output for `restore`; for a folder with the file times, which are versions."""
        if not self.root.startswith("/"):
            return self.objects("out")
        return Path(shutil.copytree(f"{self.root}/out", f"{self.root}/{name}", dirs_exist_ok=False))

    def restore(self, snapshot: Snapshot) -> None:
        """Restores the output."""
        if isinstance(snapshot, dict):
            self.put("out", snapshot)
            return
        shutil.rmtree(f"{self.root}/out", ignore_errors=True)
        shutil.copytree(snapshot, f"{self.root}/out")

    def fields(self) -> list[str]:
        # An image's scores may depend on its batch by rounding, and a copied row keeps its scores.
        return run_fields(self.root, "classify.batch_size=1")

    def run(self, selection: Selection | None = LABEL_NEW, *overrides: str) -> None:
        """Runs the job; without a selection, `stats --rebuild`."""
        config = load_config(Config, None, [*self.fields(), *overrides])
        if selection is None:
            rebuild(make_job(config).partition)
        else:
            label(config, selection=selection)

    def recorded(self, selection: Selection | None = LABEL_NEW, *overrides: str) -> list[Snapshot]:
        """Runs the job as `run` does; returns the output after each write and each removal."""
        lock, snapshots = threading.Lock(), list[Snapshot]()

        def recording(action: Callable[..., Any]) -> Callable[..., Any]:
            def act(storage: Storage, uri: str, *args: Any, **options: Any) -> Any:
                with lock:
                    result = action(storage, uri, *args, **options)
                    if uri.startswith(self.root):  # not the cache of checkpoints
                        snapshots.append(self.snapshot(f"state-{secrets.token_hex(4)}"))
                return result

            return act

        with pytest.MonkeyPatch.context() as patch:
            for name in ("write", "delete"):
                patch.setattr(Storage, name, recording(getattr(Storage, name)))
            self.run(selection, *overrides)
        return snapshots

    def dies(self, selection: Selection | None, crash: Crash) -> bool:
        """Runs the job in a process that is killed; returns whether the run died before its end."""
        return not crashing.run(self.fields(), selection, crash)

    def labels(self) -> dict[str, list[dict[str, Any]]]:
        """Returns the prediction rows that a reader sees, by shard; asserts that no sample is there twice.

        The rows have no versions, which are times for local files.
        """
        rows = [
            row
            for name, data in self.objects("out").items()
            if "/predictions/" in name and name.endswith(".parquet")
            for row in pq.read_table(io.BytesIO(data)).drop_columns(["version"]).to_pylist()
        ]
        shards: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            shards.setdefault(row["shard"], []).append(row)
        for uri, found in shards.items():
            assert [row["index"] for row in found] == list(range(len(found))), uri
        loose = Counter(row["uri"] for row in rows if "/images-" in row["shard"])
        assert not [key for key, times in loose.items() if times > 1]
        return shards

    def last_counts(self) -> dict[str, int]:
        """Returns the counts in the record of the last run."""
        records = {name: data for name, data in self.objects("out").items() if "/runs/" in name}
        last = max(map(json.loads, records.values()), key=lambda record: record["started_at"])
        return dict(last["counts"])

    def end_state(self) -> dict[str, Any]:
        """Returns the state that is equal for all runs with the same outcome."""
        state: dict[str, Any] = {}
        for path, data in self.objects("out").items():
            name = path.partition("/")[2]
            if name.startswith("predictions/") or name == "class_stats.parquet":
                state[name] = data
            if name == "manifest.parquet":  # local versions contain times
                table = pq.read_table(io.BytesIO(data)).drop_columns(["run", "committed_at"])
                is_local = self.root.startswith("/")
                state[name] = table.drop_columns(["output_version"] if is_local else []).to_pylist()
        return state
