"""Workers that die or hang under Ray: an image costs its row, other work costs its shard, never the run."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cvt.preprocessing import Preprocessor
from pipeline.config import ConfigError, RayConfig, load_job_config
from pipeline.dataflow import ClusterError, Resources, Stages
from pipeline.dataflow.ray_cluster import wait_for_worker
from pipeline.dataflow.stages import Classifier, ReadStep
from pipeline.decode import DecodeOptions
from pipeline.read import Chunk, Shard
from pipeline.run import make_job
from pipeline.storage import Storage
from tests.makers import list_shards, make_image, make_samples, make_tar

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]

#: Widths of images that kill or hang the process that decodes them, as a fault in a native decoder does.
KILLING, HANGING = 13, 17


@dataclass(frozen=True)
class DeadlyPreprocessor(Preprocessor):
    """Takes the place of a faulty decoder."""

    def __call__(self, image: Image.Image, *arguments: Any) -> np.ndarray:
        if image.width == KILLING:
            os.kill(os.getpid(), signal.SIGKILL)
        while image.width == HANGING:
            pass
        return super().__call__(image, *arguments)


def read_deadly(shards: Iterable[tuple[int, Shard]], read: ReadStep) -> Iterator[Chunk]:
    """Reads shards, and dies in the middle of some, as a reader does that the kernel kills for its memory."""
    for number, shard in shards:
        for chunk in read([(number, shard)]):
            if shard.uri.endswith("deadly.tar") and chunk.start:
                os.kill(os.getpid(), signal.SIGKILL)
            if shard.uri.endswith("deleted.tar") and chunk.total:
                Path(shard.uri).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            yield chunk


class DeadlyStages(Stages):
    def make_read_step(self, resources: Resources) -> ReadStep:
        return partial(read_deadly, read=super().make_read_step(resources))

    @property
    def decode_options(self) -> DecodeOptions:
        options = super().decode_options
        values = {field.name: getattr(options.preprocessor, field.name) for field in fields(Preprocessor)}
        return options._replace(preprocessor=DeadlyPreprocessor(**values))


def test_deadly_images_and_shards_cost_only_themselves(tmp_path: Path) -> None:
    from pipeline.dataflow.ray_executor import RayExecutor

    samples = make_samples(4, labels=False)
    bad = [(f"bad{width}.jpg", make_image(1, (width, 20))) for width in (KILLING, HANGING)]
    (tmp_path / "in").mkdir()
    for name, members in (
        ("bad", [*samples, *bad, ("last.jpg", make_image(9))]),
        ("deadly", samples),
        ("deleted", make_samples(10, labels=False)),
    ):
        (tmp_path / "in" / f"{name}.tar").write_bytes(make_tar(members))
    settings = [f"input.uri={tmp_path}/in", f"output.uri={tmp_path}/out", "model.path=fashion-mnist"]
    job = make_job(load_job_config(None, [*settings, "read.chunk_images=3", "decode.timeout_s=0.1"]))
    stages = DeadlyStages(**{field.name: getattr(job.stages, field.name) for field in fields(Stages)})
    executor, shards = RayExecutor(RayConfig(task_retries=1)), list(list_shards(Storage(), f"{tmp_path}/in"))
    chunks = list(executor.label(shards, stages, executor.resources(job.resource_request)))

    errors = {
        row["key"]: row["error"] for chunk in chunks if chunk.shard == 0 for row in chunk.samples.to_pylist()
    }
    assert errors == dict.fromkeys([*(name.partition(".")[0] for name, _ in samples), "last"]) | {
        "bad13": "cannot decode: the decoder was killed by signal 9 (SIGKILL), possibly for lack of memory",
        "bad17": "cannot decode: decoding took more than 0.1 s (decode.timeout_s)",
    }
    failed = [chunk for chunk in chunks if chunk.shard == 1 and chunk.error is not None]
    assert {chunk.samples.num_rows for chunk in failed} == {0}
    cause = f"{shards[1].uri}: 2 workers died while reading shard 1 of the plan, the last one in process "
    assert (failed[0].error or "").startswith(cause)
    assert failed[0].transient
    deleted = {chunk.error for chunk in chunks if chunk.shard == 2 and chunk.error is not None}
    assert deleted == {f"{shards[2].uri}: no such file or folder"}


class StagesWithoutOpenVino(Stages):
    """Stages on workers where openvino is not installed."""

    def make_classifier(self, resources: Resources) -> Classifier:
        sys.modules["openvino"] = None  # type: ignore[assignment]
        return super().make_classifier(resources)


def test_workers_without_openvino_are_an_error_with_the_remedy(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from pipeline.dataflow.ray_executor import RayExecutor

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(make_tar(make_samples(2, labels=False)))
    settings = [f"input.uri={tmp_path}/in", f"output.uri={tmp_path}/out", "model.path=fashion-mnist"]
    job = make_job(load_job_config(None, settings))
    stages = StagesWithoutOpenVino(
        **{field.name: getattr(job.stages, field.name) for field in fields(Stages)}
    )
    executor, shards = RayExecutor(RayConfig()), list(list_shards(Storage(), f"{tmp_path}/in"))
    resources = executor.resources(job.resource_request)
    message = (
        r"^classify\.runtime: on the node .* openvino is not installed: .* or set classify\.runtime: torch$"
    )
    with pytest.raises(ConfigError, match=message):
        list(executor.label(shards, stages, resources))


def test_worker_that_does_not_start_is_reported_with_the_cause_from_the_logs() -> None:
    import ray

    missing = ray.remote(num_cpus=0, runtime_env={"py_executable": "/missing/python"})(lambda: None).remote()
    with pytest.raises(ClusterError, match=r"no worker process has started .*/missing/python: No such file"):
        wait_for_worker(missing, timeout=8)
    ray.cancel(missing, force=True)
    wait_for_worker(ray.remote(num_cpus=0)(lambda: None).remote())
