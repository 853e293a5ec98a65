"""A run with two pools of classifiers on a Ray cluster whose nodes drain, join and die.

`test_pools` runs this module in a separate process, because the test process is connected to another
Ray. The GPUs are in name only: a classifier sleeps for as long as its device would need, and then runs
the model on the CPU. The module writes JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
from ray.cluster_utils import Cluster

from pipeline.commit import Progress
from pipeline.config import Config, load_config
from pipeline.dataflow import Resources, Stages
from pipeline.dataflow.stages import Classifier
from pipeline.read import Chunk
from pipeline.run import Job, PreparedRun, label
from tests.makers import make_image, make_tar
from tests.ray_head import RAY

SHARDS, IMAGES, CHUNK = 40, 32, 8
#: Seconds for a chunk.
SECONDS = {"cuda": 0.15, "cpu": 0.6}
#: Seconds that a drained node has to finish its chunks.
DEADLINE = 6


@dataclass(frozen=True)
class RecordedStages(Stages):
    """Stages whose classifiers write a line before and after each chunk."""

    folder: str = ""

    def make_classifier(self, resources: Resources) -> Classifier:
        classifier: Any = super().make_classifier(replace(resources, device="cpu", threads=1))
        return RecordedClassifier(classifier, resources.device, self.folder)  # type: ignore[return-value]


class RecordedClassifier:
    def __init__(self, classifier: Classifier, device: str, folder: str) -> None:
        self.decode_options, self.timeout_s = classifier.decode_options, classifier.timeout_s
        self._classifier, self._device = classifier, device
        self._file = Path(folder, f"{ray.get_runtime_context().get_node_id()}-{device}-{os.getpid()}")

    def __call__(self, chunk: Chunk) -> Chunk:
        self._write("start")
        if self._device == "cuda":  # waits for the slow pool, which gets no shard before it has started
            wait_until(lambda: len(list(self._file.parent.iterdir())) >= 3)
        time.sleep(SECONDS[self._device])
        result = self._classifier(chunk)
        self._write("end")
        return result

    def _write(self, event: str) -> None:
        with self._file.open("a") as file:
            file.write(f"{event} {time.time()}\n")


def wait_until(condition: Callable[[], bool], timeout: float = 300) -> float:
    """Returns the seconds until the condition holds; raises `TimeoutError`."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout:
            raise TimeoutError
        time.sleep(0.05)
    return time.monotonic() - start


def main(folder: Path, result: Path) -> None:
    images = [make_image(i, (300, 300)) for i in range(IMAGES)]
    for shard in range(SHARDS):
        tar = make_tar([(f"{shard}-{i}.jpg", image) for i, image in enumerate(images)])
        (folder / f"{shard:03d}.tar").write_bytes(tar)
    events = folder.parent / "events"
    events.mkdir()
    stages = Job.stages.fget  # type: ignore[attr-defined]
    Job.stages = property(  # type: ignore[assignment]
        lambda job: RecordedStages(
            **{field.name: getattr(stages(job), field.name) for field in fields(Stages)}, folder=str(events)
        )
    )
    head = {"num_cpus": 0, "object_store_memory": 150_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    with_cpus: dict[str, Any] = {"num_cpus": 6, "object_store_memory": 150_000_000}
    with_gpu = with_cpus | {"num_gpus": 1, "labels": {"ray.io/accelerator-type": "L4"}}
    try:
        drained, killed = cluster.add_node(**with_gpu), cluster.add_node(**with_cpus)
        config = load_config(
            Config,
            None,
            [
                f"input.uri={folder}",
                "model.path=fashion-mnist",
                f"output.uri={folder.parent}/out",
                f"read.chunk_images={CHUNK}",
                "decode.num_cpus=0.5",
                "classify.device=cuda",
                "classify.pools=[{gpu: L4}, {device: cpu, num_cpus: 1, max_actors: 2, threads: 1}]",
                f"ray.address={cluster.address}",
            ],
        )
        arrivals = [(time.monotonic(), 0)]

        def arrived(progress: Progress, prepared: PreparedRun) -> None:
            arrivals.append((time.monotonic(), progress.images))

        def reached(fraction: float) -> Callable[[], bool]:
            return lambda: arrivals[-1][1] >= fraction * SHARDS * IMAGES or running.done()

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(label, config, on_progress=arrived)
            wait_until(reached(0.15))
            command = [RAY, "drain-node", f"--address={cluster.address}", f"--node-id={drained.node_id}"]
            command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"]
            command += [f"--deadline-remaining-seconds={DEADLINE}"]
            subprocess.run(command, check=True, capture_output=True)
            drained_at = time.time()
            time.sleep(DEADLINE)
            cluster.remove_node(drained, allow_graceful=True)
            joined = cluster.add_node(**with_gpu)  # works in the main thread only
            wait_until(reached(0.5))
            cluster.remove_node(killed, allow_graceful=False)
            killed_at = time.monotonic()
            done = running.result()
        files = [pq.read_table(path) for path in (folder.parent / "out").rglob("predictions/**/*.parquet")]
        rows = [row for file in files for row in file.to_pylist()]
        seen = Counter(f"{row['shard']}/{row['key']}" for row in rows)
        scores: dict[tuple[str, str], list[float]] = {}  # by image, of which each shard has a copy, and label
        for row in rows:
            scores.setdefault((row["key"].partition("-")[2], row["label"]), []).append(row["score"])
        names = {drained.node_id: "drained", killed.node_id: "killed", joined.node_id: "joined"}
        chunks: dict[str, Counter[str]] = {}
        last_start = 0.0
        for path in events.iterdir():
            node, device, _ = path.name.split("-")
            lines = [line.split() for line in path.read_text().splitlines()]
            chunks.setdefault(f"{names[node]} {device}", Counter()).update(event for event, _ in lines)
            if names[node] == "drained":
                starts = (float(at) - drained_at for event, at in lines if event == "start")
                last_start = max(last_start, *starts)
        times = [*(at for at, _ in arrivals[1:]), time.monotonic()]
        gaps = [(end - start, end) for start, end in pairwise(times)]
        result.write_text(
            json.dumps(
                {
                    "samples": len(seen),
                    "duplicates": sum(count - 1 for count in seen.values()),
                    "labels": len(scores),
                    "score_difference": max(max(each) - min(each) for each in scores.values()),
                    "errors": done.totals.errors,
                    "complete": done.is_complete,
                    "chunks": {name: dict(counts) for name, counts in chunks.items()},
                    "last_start_on_drained": last_start,
                    "stall": max(gap for gap, end in gaps if end <= killed_at),
                    "stall_after_loss": max(gap for gap, end in gaps if end > killed_at),
                    "until_end": times[-1] - killed_at,
                }
            )
        )
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
