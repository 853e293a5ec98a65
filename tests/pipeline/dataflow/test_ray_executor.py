from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RayConfig, load_job_config
from pipeline.read import list_shards
from pipeline.run import make_job
from pipeline.storage import Storage
from tests.makers import make_samples, make_tar

pytestmark = pytest.mark.usefixtures("ray_local")


class Deadly:
    """A preprocessor that kills its process, as a fault in a decoder's native code does."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_chunk_that_kills_its_workers_ends_the_run_and_is_named(tmp_path: Path) -> None:
    from pipeline.dataflow.ray_executor import RayExecutor

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(make_tar(make_samples(3)))
    fields = [f"input.uri={tmp_path}/in", f"output.uri={tmp_path}/out", "model.path=fashion-mnist"]
    job = make_job(load_job_config(None, fields))
    executor = RayExecutor(RayConfig(task_retries=1))
    checkpoint = replace(job.checkpoint, preprocessor=Deadly(28))
    stages, shards = (
        replace(job.stages, checkpoint=checkpoint),
        list(list_shards(Storage(), f"{tmp_path}/in")),
    )
    with pytest.raises(Exception, match="2 workers died at it") as caught:
        list(executor.label(shards, stages, executor.resources(job.resource_request)))
    assert f"{tmp_path}/in/a.tar" in str(caught.value)
