"""Kills, faults and restarts at random, for a number of rounds: `make soak ROUNDS=50 SEED=7`.

In every round the input changes, and one or two jobs label it from a real S3 server, through a proxy that
injects faults; most of them are killed or told to stop at a random moment. Every few rounds the job runs on
a real Ray, whose workers are killed too. After each round, a reader's view is checked; at the end a run
without disturbance does the rest, and every sample must be there exactly once, as it is in the input.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from jobs.local_s3 import LocalS3
from pipeline.config import LABEL_NEW, Selection
from pipeline.storage import ObjectNotFound, Storage
from tests.fault_proxy import FaultProxy
from tests.makers import make_image, make_tar
from tests.pipeline import crashing

ROOT = "s3://soak"
TARS = 12
_LONGEST_RUN = 720
#: With what a run may end that was sent a signal (1: of a KeyboardInterrupt).
_STATUSES = {
    "none": {0},
    "SIGKILL": {0, -signal.SIGKILL},
    "SIGTERM": {0, 1, -signal.SIGTERM},  # the signal, as long as Python starts
    "SIGSTOP": {0},
}


@dataclass
class Soak:
    """The state of a soak: what is in the input, and what has happened.

    Attributes:
        random: where chance comes from.
        samples: by object of the input, the keys of its samples.
        events: what was done to the jobs, by kind.
        problems: what a reader saw that it must never see.
    """

    random: random.Random
    samples: dict[str, list[str]] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def change_input(self, storage: Storage) -> None:
        """Adds, changes and removes some shards; keys tell the versions of a tar apart."""
        for _ in range(self.random.randint(1, 4)):
            name = f"{self.random.randrange(TARS):02d}.tar"
            if name in self.samples and self.random.random() < 0.3:
                storage.delete(f"{ROOT}/in/{name}")
                del self.samples[name]
                continue
            version = self.random.randrange(10**6)
            keys = [f"{version}-{i}" for i in range(self.random.randint(1, 25))]
            tar = make_tar([(f"{key}.jpg", make_image(version + i)) for i, key in enumerate(keys)])
            storage.write(f"{ROOT}/in/{name}", tar)
            self.samples[name] = keys
        for _ in range(self.random.randint(0, 6)):
            name = f"loose/{self.random.randrange(60):03d}.jpg"
            if name in self.samples and self.random.random() < 0.5:
                storage.delete(f"{ROOT}/in/{name}")
                del self.samples[name]
            else:
                storage.write(f"{ROOT}/in/{name}", make_image(self.random.randrange(10**6)))
                self.samples[name] = [name]

    def found(self, storage: Storage) -> Counter[tuple[str, str]]:
        """What a reader of the predictions sees: how often each sample is there, by shard and key.

        Of loose images, whose groups change, the key alone counts.
        """
        seen: Counter[tuple[str, str]] = Counter()
        try:
            for info in storage.list(f"{ROOT}/out"):
                if "/predictions/" in info.uri:
                    table = pq.read_table(io.BytesIO(storage.read(info.uri)), columns=["shard", "key"])
                    for row in table.to_pylist():
                        shard = row["shard"].removeprefix(f"{ROOT}/in/")
                        seen["loose" if shard.startswith("images-") else shard, row["key"]] += 1
        except ObjectNotFound:
            pass
        return seen

    def lost_and_doubled(self, storage: Storage) -> tuple[int, int]:
        """Samples of the input that have no label, and samples that have two."""
        found = self.found(storage)
        expected = {
            ("loose" if name.startswith("loose/") else name, key)
            for name, keys in self.samples.items()
            for key in keys
        }
        return len(expected - found.keys()), sum(count - 1 for count in found.values())


def run_soak(rounds: int, seed: int, ray_every: int) -> tuple[Soak, int, int]:
    """Runs the soak; returns its state, and the samples lost and doubled."""
    soak = Soak(random.Random(seed))
    with LocalS3() as server:
        os.environ.update(server.environment())
        server.create_bucket("soak")
        storage = Storage(endpoint_url=server.endpoint_url)
        with FaultProxy(server.endpoint_url, seed=seed, rate=0.05) as proxy:
            for number in range(1, rounds + 1):
                soak.change_input(storage)
                if not soak.samples:
                    continue
                if ray_every and number % ray_every == 0:
                    _round_on_ray(soak, proxy.url)
                else:
                    _round(soak, storage, proxy.url)
                doubled = [sample for sample, count in soak.found(storage).items() if count > 1]
                if doubled:
                    soak.problems.append(f"round {number}: twice: {doubled[:3]}")
                print(f"round {number}: {_line(soak, proxy)}", flush=True)
            soak.events.update(proxy.injected)
        fields = [f"storage.endpoint_url={server.endpoint_url}", *_fields()]
        assert crashing.run(fields, LABEL_NEW)
        return soak, *soak.lost_and_doubled(storage)


def _fields() -> list[str]:
    return [f"input.uri={ROOT}/in", f"output.uri={ROOT}/out", "model.path=fashion-mnist"]


def _line(soak: Soak, proxy: FaultProxy) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted((soak.events + proxy.injected).items()))


def _round(soak: Soak, storage: Storage, url: str) -> None:
    """One or two jobs without Ray, each with an end of its own; neither respects the other's lease."""
    fields = [f"storage.endpoint_url={url}", *_fields(), "run.flush_interval_s=0.2", "run.grace_period_s=0.3"]
    jobs = []
    for _ in range(soak.random.choice([1, 1, 2])):
        job = crashing.start(fields, Selection(prune=soak.random.random() < 0.2))
        jobs.append((job, soak.random.choice(["none", "SIGKILL", "SIGKILL", "SIGTERM", "SIGSTOP"])))
    if len(jobs) > 1:
        soak.events["overlapping run"] += 1
    if soak.random.random() < 0.3:
        jobs[0][0].join(soak.random.uniform(0, 2))
        soak.change_input(storage)
        soak.events["input changed under a run"] += 1
    suspended = []
    for job, end in jobs:
        if end != "none":
            job.join(soak.random.uniform(0, 2.5))
            if job.is_alive() and job.pid is not None:
                os.kill(job.pid, signal.Signals[end])
                soak.events[end] += 1
                suspended += [job] if end == "SIGSTOP" else []
    for job in suspended:  # while it sleeps, another run begins and ends
        other = crashing.start(fields, LABEL_NEW)
        other.join(_LONGEST_RUN)
        os.kill(job.pid or 0, signal.SIGCONT)
    for job, end in jobs:
        job.join(_LONGEST_RUN)
        if job.is_alive():
            job.kill()
            soak.problems.append("a run did not end")
        elif job.exitcode == crashing.OVERTAKEN:
            soak.events["run that was overtaken"] += 1
        elif job.exitcode not in _STATUSES[end]:
            soak.problems.append(f"a run ended with {job.exitcode} ({end})")


def _round_on_ray(soak: Soak, url: str) -> None:
    """A job on a local Ray, whose workers, or which itself, is killed in its midst."""
    values = [f"storage.endpoint_url={url}", *_fields(), "run.lease_duration_s=3", "read.chunk_images=4"]
    fields = [word for value in values for word in ("--set", value)]
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.label", "--config", os.devnull, "--relabel", "--wait", *fields],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    soak.events["run on Ray"] += 1
    victim = soak.random.choice(["MapWorker", "_decode_block", "driver"])
    deadline = time.monotonic() + _LONGEST_RUN
    below: dict[int, str] = {}
    while job.poll() is None and time.monotonic() < deadline:
        now = descendants(job.pid)
        below |= now
        if any("MapWorker" in command and "__init__" not in command for command in now.values()):
            wanted = [pid for pid, command in now.items() if victim in command]
            if victim == "driver" or wanted:
                os.kill(wanted[0] if wanted else job.pid, signal.SIGKILL)
                soak.events[f"killed {victim}"] += 1
                break
        time.sleep(0.05)
    try:
        job.wait(max(1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        job.kill()
        soak.problems.append("a run on Ray did not end")
    time.sleep(1)  # Ray's workers go when their driver has gone; two of its agents don't
    for pid, command in below.items():
        try:
            if command.encode()[:15] in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" "):
                os.kill(pid, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue


def descendants(ancestor: int) -> dict[int, str]:
    """The commands of the processes below one, by their ids."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    processes = [line.split(maxsplit=2) for line in listed.splitlines()]
    below = {ancestor: ""}
    for pid, parent, command in processes:  # parents are older, and come first
        if int(parent) in below:
            below[int(pid)] = command
    return {pid: command for pid, command in below.items() if pid != ancestor}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Kill, fault and restart labelling jobs at random.")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray-every", type=int, default=8, help="rounds from one on a real Ray to the next")
    arguments = parser.parse_args()
    soak, lost, doubled = run_soak(arguments.rounds, arguments.seed, arguments.ray_every)
    print(f"rounds: {arguments.rounds}")
    for kind, count in sorted(soak.events.items()):
        print(f"{kind}: {count}")
    print(f"samples in the end: {sum(map(len, soak.samples.values()))}")
    print(f"samples lost: {lost}")
    print(f"samples doubled: {doubled}")
    for problem in soak.problems:
        print(problem)
    sys.exit(1 if lost or doubled or soak.problems else 0)


if __name__ == "__main__":
    main()
