from __future__ import annotations

import os
import signal
from dataclasses import fields
from pathlib import Path

import pytest

from pipeline.config import RayConfig, load_job_config
from pipeline.dataflow import Stages
from pipeline.dataflow.stages import DecodeStep
from pipeline.read import Chunk, list_shards
from pipeline.run import make_job
from pipeline.storage import Storage
from tests.makers import make_samples, make_tar

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]


def die(chunk: Chunk) -> Chunk:
    """Kills the process, as a crash in native decoder code does."""
    os.kill(os.getpid(), signal.SIGKILL)
    return chunk


class DeadlyStages(Stages):
    def make_decode_step(self) -> DecodeStep:
        return die


def test_chunk_that_kills_its_workers_is_named_in_the_error(tmp_path: Path) -> None:
    from pipeline.dataflow.ray_executor import RayExecutor

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(make_tar(make_samples(3)))
    settings = [f"input.uri={tmp_path}/in", f"output.uri={tmp_path}/out", "model.path=fashion-mnist"]
    job = make_job(load_job_config(None, settings))
    stages = DeadlyStages(**{field.name: getattr(job.stages, field.name) for field in fields(Stages)})
    executor, shards = RayExecutor(RayConfig(task_retries=1)), list(list_shards(Storage(), f"{tmp_path}/in"))
    with pytest.raises(Exception, match="decoding shard 0 of the plan, from sample 0: 2 workers died"):
        list(executor.label(shards, stages, executor.resources(job.resource_request)))
