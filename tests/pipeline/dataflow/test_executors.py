"""Both executors give the same results; threads of the in-process executor."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.dataflow import Resources, Stages, open_executor
from pipeline.dataflow.local_executor import usable_cpus
from pipeline.dataflow.ray_cluster import ray_cluster
from pipeline.dataflow.stages import Classifier, ReadStep
from pipeline.decode import decode_chunk
from pipeline.read import Chunk, Shard
from pipeline.run import Job, label, make_job
from pipeline.statistics import CLASSIFY, DECODE, STORAGE
from pipeline.storage import Storage
from tests.makers import list_shards, make_samples, make_tar
from tests.runs import run_config

SHARDS, IMAGES = 3, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few tars, one of them truncated."""
    root = tmp_path_factory.mktemp("executors")
    (root / "in").mkdir()
    for number in range(SHARDS):
        tar = make_tar([*make_samples(IMAGES), ("bad.jpg", b"no image")])
        (root / "in" / f"{number}.tar").write_bytes(tar)
    (root / "in" / "broken.tar").write_bytes(make_tar(make_samples(IMAGES))[:9000])
    return root


@pytest.fixture(scope="module")
def job(folder: Path) -> Job:
    return make_job(run_config(folder))


@pytest.fixture
def shards(job: Job) -> list[Shard]:
    return list(list_shards(Storage(), job.config.input.uri))


def without_metrics(chunk: Chunk) -> Chunk:
    """A chunk without metrics, which differ between attempts."""
    return replace(chunk, metrics={})


def without_thumbnails(chunk: Chunk) -> Chunk:
    """A chunk without thumbnails, which depend on earlier chunks."""
    return replace(chunk, samples=chunk.samples.drop_columns(["thumbnail"]))


def label_step_by_step(job: Job, shards: list[Shard], resources: Resources) -> list[Chunk]:
    classifier = Classifier(job.stages, resources)
    chunks = job.stages.make_read_step(resources)(enumerate(shards))
    return [classifier(decode_chunk(chunk, job.stages.decode_options)) for chunk in chunks]


def test_classifier_frees_the_weights_of_the_checkpoint(job: Job) -> None:
    stages = replace(job.stages, checkpoint=copy.deepcopy(job.checkpoint))
    model = weakref.ref(stages.checkpoint.model)
    with open_executor(job.config.ray) as executor:
        classifier = Classifier(stages, executor.resources(job.resource_request))
    del stages
    gc.collect()
    assert model() is None
    del classifier


def test_threads_label_as_the_stages_do_one_by_one(job: Job, shards: list[Shard]) -> None:
    with open_executor(job.config.ray) as executor:
        resources = executor.resources(job.resource_request)
        chunks = list(executor.label(shards, job.stages, resources))
    expected = label_step_by_step(job, shards, resources)
    assert len(expected) > SHARDS * 2
    order: Callable[[Chunk], tuple[int, int]] = lambda chunk: (chunk.shard, chunk.start)  # noqa: E731
    found, wanted = (
        [without_metrics(without_thumbnails(chunk)) for chunk in sorted(labeled, key=order)]
        for labeled in (chunks, expected)
    )
    assert found == wanted
    for chunk in chunks:
        assert chunk.pixels is None
        assert chunk.metrics.keys() == {STORAGE, DECODE, CLASSIFY}
        assert chunk.metrics[STORAGE].bytes == chunk.encoded_bytes
    # Chunks that are classified at the same time share a timer, so one may have no busy time of its own.
    assert sum(chunk.metrics[CLASSIFY].busy_s for chunk in chunks) > 0


class CountingStages(Stages):
    """Stages that count the chunks that are read; reading may fail."""

    read = 0
    fails_at: int | None = None

    def make_read_step(self, resources: Resources) -> ReadStep:
        step = super().make_read_step(resources)

        def counted(numbered: Iterator[tuple[int, Shard]]) -> Iterator[Chunk]:
            for chunk in step(numbered):
                type(self).read += 1
                if self.read == self.fails_at:
                    raise RuntimeError("disk failure")
                yield chunk

        return counted  # type: ignore[return-value]


def counting_stages(job: Job, fails_at: int | None = None) -> Stages:
    kind = type("Counting", (CountingStages,), {"read": 0, "fails_at": fails_at})
    stages: Stages = kind(**vars(job.stages))
    return stages


def test_slow_consumer_limits_the_chunks_in_memory(job: Job, shards: list[Shard]) -> None:
    stages, before = counting_stages(job), threading.active_count()
    with open_executor(job.config.ray) as executor:
        resources = replace(executor.resources(job.resource_request), readers=1, decoders=1)
        chunks = executor.label(shards * 20, stages, resources)
        next(chunks)
        time.sleep(0.5)
        threads = 1 + 1 + stages.classify.concurrent_chunks
        assert stages.read <= threads + 2 + 1  # two pending results and the consumed one
        chunks.close()
    for name in [thread.name for thread in threading.enumerate()]:
        assert not name.startswith("stages"), name
    assert threading.active_count() <= before + 4  # threads of the engine


def test_failing_stage_ends_the_run_with_its_error(job: Job, shards: list[Shard]) -> None:
    with open_executor(job.config.ray) as executor:
        resources = executor.resources(job.resource_request)
        with pytest.raises(RuntimeError, match="disk failure"):
            list(executor.label(shards, counting_stages(job, fails_at=4), resources))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stages")]


def test_failure_names_the_unfinished_shards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Classifier, chunk: Chunk) -> Chunk:
        raise RuntimeError("device lost")

    monkeypatch.setattr(Classifier, "__call__", fail)
    with pytest.raises(RuntimeError, match="device lost") as caught:
        label(run_config(folder, f"output.uri={tmp_path}/out"))
    assert str(folder / "in" / "0.tar") in caught.value.__notes__[0]


def test_hung_model_ends_the_run(job: Job, shards: list[Shard], monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def wait(self: Classifier, chunk: Chunk) -> Chunk:
        released.wait(60)
        return chunk

    monkeypatch.setattr(Classifier, "__call__", wait)
    stages = replace(job.stages, classify=job.stages.classify.model_copy(update={"timeout_s": 0.1}))
    with open_executor(job.config.ray) as executor:
        chunks = executor.label(shards, stages, executor.resources(job.resource_request))
        with pytest.raises(TimeoutError, match=r"took more than 0\.1 s \(classify\.timeout_s\)"):
            next(chunks)
        released.set()
        chunks.close()


def test_missing_gpu_is_rejected(folder: Path) -> None:
    job = make_job(run_config(folder, "classify.device=cuda", "model.precision=fp32"))
    with open_executor(job.config.ray) as executor, pytest.raises(ConfigError, match="finds no GPU"):
        executor.resources(job.resource_request)


def test_ray_cluster_rejects_the_in_process_address() -> None:
    with pytest.raises(ConfigError, match="only labeling supports"), ray_cluster("in-process"):
        pytest.fail("connected")


@pytest.mark.slow
def test_in_process_run_imports_neither_ray_nor_transformers(folder: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from pipeline.run import label
from tests.runs import run_config
assert label(run_config({str(folder)!r}, "output.uri={tmp_path}/out")).totals.images
assert not {{"ray", "transformers", "torch._dynamo"}} & sys.modules.keys()
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, check=False
    )
    assert done.returncode == 0


@pytest.mark.usefixtures("ray_local")
def test_both_executors_write_the_same_prediction_files(folder: Path, tmp_path: Path) -> None:
    files = []
    for name, address in (("ray", "null"), ("local", "in-process")):
        fields = f"output.uri={tmp_path}/{name}", f"ray.address={address}", "classify.num_cpus=1"
        result = label(run_config(folder, *fields))
        assert result.totals.images == SHARDS * (IMAGES + 1)
        paths = (tmp_path / name).rglob("predictions/**/*.parquet")
        files.append({path.relative_to(tmp_path / name): path.read_bytes() for path in paths})
    assert len(files[0]) == SHARDS
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("content", "expected"),
    [("150000 100000", 1), ("50000 100000", 1), ("400000 100000", 4), ("max 100000", 64), (None, 64)],
)
def test_container_quota_limits_the_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    if content is not None:
        (tmp_path / "cpu.max").write_text(content + "\n")
    assert usable_cpus(tmp_path / "cpu.max") == expected


ABORTED = """
import os, signal, sys, threading, time
from pipeline.dataflow import stages
from pipeline.run import label
from tests.runs import run_config

class Slow(stages.Classifier):
    def __call__(self, chunk):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(300)

stages.Classifier = Slow
label(run_config(sys.argv[1], "run.grace_period_s=0"))
"""


@pytest.mark.slow
def test_process_of_an_aborted_run_ends_at_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").symlink_to(folder / "in")
    command = [sys.executable, "-c", ABORTED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode != 0
    assert "KeyboardInterrupt" in done.stderr
