"""A run on two Ray nodes of this machine, during which a classifier, a decoder and a node are killed.

`test_failures` runs this script in a separate process, because the test process is connected to another Ray.
The script writes JSON: the samples in the prediction files, the outcome of the run, and for each failure the
number of later results and the longest wait for a result in seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from ray.cluster_utils import Cluster

from pipeline.commit import Progress
from pipeline.config import Config, load_config
from pipeline.run import PreparedRun, label
from tests.makers import make_image, make_tar

SHARDS, IMAGES, CHUNK = 32, 32, 8


def workers(parents: list[int]) -> dict[int, str]:
    """Process titles of the Ray workers that these processes have started, by process id."""
    found: dict[int, str] = {}
    for parent in parents:
        for entry in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            try:
                title = Path(f"/proc/{entry}/cmdline").read_text().replace("\0", " ").strip()
            except OSError:  # the process has ended
                continue
            if title.startswith("ray::"):
                found[int(entry)] = title
    return found


def kill_one(parents: list[int], name: str) -> bool:
    """Kills one worker whose title contains the name; returns False if there is none."""
    for pid, title in workers(parents).items():
        if name in title and "__init__" not in title:
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def main(folder: Path, result: Path) -> None:
    images = [make_image(i, (300, 300)) for i in range(IMAGES)]
    for shard in range(SHARDS):
        tar = make_tar([(f"{shard}-{i}.jpg", image) for i, image in enumerate(images)])
        (folder / f"{shard:03d}.tar").write_bytes(tar)
    node_options: dict[str, Any] = {
        "num_cpus": 4,
        "object_store_memory": 150_000_000,
        "include_dashboard": False,
    }
    cluster = Cluster(initialize_head=True, head_node_args=node_options)
    try:
        node = cluster.add_node(num_cpus=4, object_store_memory=150_000_000)
        config = load_config(
            Config,
            None,
            [
                f"input.uri={folder}",
                "model.path=fashion-mnist",
                f"output.uri={folder.parent}/out",
                f"read.chunk_images={CHUNK}",
                "classify.threads=1",
                "classify.min_actors=4",  # more than fit on one node
                f"ray.address={cluster.address}",
            ],
        )
        nodes: list[Any] = [node, cluster.head_node]
        raylets = [n.all_processes["raylet"][0].process.pid for n in nodes]

        def lose_node() -> bool:
            if not any("MapWorker" in title for title in workers(raylets[:1]).values()):
                return False
            cluster.remove_node(node, allow_graceful=False)
            return True

        failures = {
            "decoder": (0.1, lambda: kill_one(raylets, "decode_block")),
            "classifier": (0.2, lambda: kill_one(raylets, "MapWorker")),
            "node": (0.5, lose_node),
        }
        arrivals: list[float] = []
        failed_at: dict[str, float] = {}
        images = 0

        def fail() -> None:
            for name, (fraction, failure) in failures.items():
                while images < fraction * SHARDS * IMAGES or not failure():
                    time.sleep(0.02)
                failed_at[name] = time.monotonic()

        def arrived(progress: Progress, prepared: PreparedRun) -> None:
            nonlocal images
            images = progress.images
            arrivals.append(time.monotonic())

        threading.Thread(target=fail, daemon=True).start()
        done = label(config, on_progress=arrived)
        times = [*arrivals, time.monotonic()]
        files = [pq.read_table(path) for path in (folder.parent / "out").rglob("predictions/**/*.parquet")]
        seen = Counter(f"{row['shard']}/{row['key']}" for file in files for row in file.to_pylist())
        gaps = [(end - start, end) for start, end in pairwise(times)]
        found = {
            "samples": len(seen),
            "duplicates": sum(count - 1 for count in seen.values()),
            "errors": done.totals.errors,
            "shards": done.totals.shards,
            "complete": done.is_complete,
            "after": {name: sum(t > when for t in arrivals) for name, when in failed_at.items()},
            "stall": {name: max(gap for gap, end in gaps if end > when) for name, when in failed_at.items()},
            "until_end": {name: times[-1] - when for name, when in failed_at.items()},
        }
        result.write_text(json.dumps(found))  # Ray writes to standard output
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
