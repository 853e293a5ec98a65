"""A run with the manifests' configuration that starts on a head without CPUs and gets a worker later.

`test_growing` runs this module in a separate process, because the test process is connected to another Ray.
The module writes JSON: the number of images, whether the run is complete, and the seconds from the start to
the new worker and to the first result.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from ray.cluster_utils import Cluster

from pipeline.commit import RunRecord
from pipeline.config import Config, load_config
from pipeline.run import label
from tests.makers import make_image, make_tar

MANIFEST = Path(__file__).parents[2] / "configs" / "kubernetes" / "config.yaml"
SHARDS, IMAGES = 4, 10
#: Seconds before the cluster gets a worker.
DELAY = 3.0


def event_at(name: str) -> threading.Event:
    """An event that is set when the record of a run has the time of the event `name`."""
    came, record = threading.Event(), RunRecord.record_time

    def recorded(self: RunRecord, event: str, *at: float) -> None:
        record(self, event, *at)
        if event == name:
            came.set()

    RunRecord.record_time = recorded  # type: ignore[method-assign]
    return came


def main(folder: Path, result: Path) -> None:
    for shard in range(SHARDS):
        (folder / f"{shard}.tar").write_bytes(make_tar([(f"{i}.jpg", make_image(i)) for i in range(IMAGES)]))
    job = folder.parent / "job.yaml"
    job.write_text(yaml.safe_load(MANIFEST.read_text())["data"]["job.yaml"])
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000, "include_dashboard": False},
    )
    try:
        there = [f"input.uri={folder}", f"output.uri={folder.parent}/out", "model.path=fashion-mnist"]
        # For a machine without a GPU. The stages have the CPUs of the manifests.
        cpu = ["classify.device=cpu", "classify.num_gpus=null", "model.precision=fp32", "classify.threads=1"]
        config = load_config(Config, job, [*there, *cpu, f"ray.address={cluster.address}"])
        ready, start = event_at("executor_ready"), time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(label, config)
            while not (ready.wait(0.2) or running.done()):
                pass
            time.sleep(DELAY)
            cluster.add_node(num_cpus=8, object_store_memory=150_000_000)  # works in the main thread only
            grown = time.monotonic() - start
            done = running.result()
        found = {
            "images": done.totals.images,
            "complete": done.is_complete,
            "grown": grown,
            "executor_ready": done.timings["executor_ready"],
            "first_result": done.timings["first_result"],
        }
        result.write_text(json.dumps(found))  # standard output also has Ray's messages
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
