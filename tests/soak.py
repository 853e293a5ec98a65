"""Random kills, faults and restarts of labeling jobs, for several rounds: `make soak ROUNDS=50 SEED=7`.

In every round the input changes, and some jobs label it, or shares of it, on a real S3 server, through a
proxy that injects faults. Most jobs are killed or stopped at a random time. Every few rounds the job runs on
a real Ray, whose workers are killed too. After each round, the view of a reader is checked. At the end an
undisturbed run labels the remaining shards. Then every sample of the input must be labeled exactly once.
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
from collections.abc import Iterable
from contextlib import suppress
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
_MAX_RUN_S = 720
#: Shares of the jobs of a round without Ray.
_SHARES = (["1/1"], ["1/1"], ["1/1", "1/1"], ["1/2", "2/2"], ["1/2", "2/3"], ["3/3", "1/3", "2/3"])
#: Exit statuses that a run may have after a signal; 1 is a KeyboardInterrupt.
_STATUSES = {
    "none": {0},
    "SIGKILL": {0, -signal.SIGKILL},
    "SIGTERM": {0, 1, -signal.SIGTERM},  # the signal itself, while Python starts
    "SIGSTOP": {0},
}


@dataclass
class Soak:
    """The state of a soak test.

    Attributes:
        random: source of random numbers.
        samples: keys of the samples, by object of the input.
        events: number of kills, faults and other events, by kind.
        problems: violations of the guarantees.
    """

    random: random.Random
    samples: dict[str, list[str]] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def change_input(self, storage: Storage) -> None:
        """Adds, changes and removes some shards; each version of a tar has other keys."""
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

    def count_labels(self, storage: Storage) -> Counter[tuple[str, str]]:
        """Returns how often each sample occurs in the predictions, by shard and key.

        Image files are counted by key only, because their groups change.
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

    def lost_and_duplicated(self, storage: Storage) -> tuple[int, int]:
        """Returns the number of samples without a label, and of surplus labels."""
        found = self.count_labels(storage)
        expected = {
            ("loose" if name.startswith("loose/") else name, key)
            for name, keys in self.samples.items()
            for key in keys
        }
        return len(expected - found.keys()), sum(count - 1 for count in found.values())


def run_soak(rounds: int, seed: int, ray_every: int) -> tuple[Soak, int, int]:
    """Runs the soak test; returns its state, and the numbers of lost and duplicated samples."""
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
                duplicated = [sample for sample, count in soak.count_labels(storage).items() if count > 1]
                if duplicated:
                    soak.problems.append(f"round {number}: labeled twice: {duplicated[:3]}")
                print(f"round {number}: {_line(soak, proxy)}", flush=True)
            soak.events.update(proxy.injected)
        fields = [f"storage.endpoint_url={server.endpoint_url}", *_fields()]
        assert crashing.run(fields, LABEL_NEW)
        return soak, *soak.lost_and_duplicated(storage)


def _fields() -> list[str]:
    return [f"input.uri={ROOT}/in", f"output.uri={ROOT}/out", "model.path=fashion-mnist"]


def _line(soak: Soak, proxy: FaultProxy) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted((soak.events + proxy.injected).items()))


def _round(soak: Soak, storage: Storage, url: str) -> None:
    """Runs some jobs without Ray, each with its own share and end; live leases are ignored."""
    fields = [f"storage.endpoint_url={url}", *_fields(), "run.flush_interval_s=0.2", "run.grace_period_s=0.3"]
    jobs = []
    for share in soak.random.choice(_SHARES):
        soak.events["run of a share"] += share != "1/1"
        selection = Selection(prune=soak.random.random() < 0.2)
        job = crashing.start([*fields, f"run.share={share}"], selection)
        jobs.append((job, soak.random.choice(["none", "SIGKILL", "SIGKILL", "SIGTERM", "SIGSTOP"])))
    if len(jobs) > 1:
        soak.events["overlapping run"] += 1
    if soak.random.random() < 0.3:
        jobs[0][0].join(soak.random.uniform(0, 2))
        soak.change_input(storage)
        soak.events["input changed during a run"] += 1
    suspended = []
    for job, end in jobs:
        if end != "none":
            job.join(soak.random.uniform(0, 2.5))
            if job.is_alive() and job.pid is not None:
                os.kill(job.pid, signal.Signals[end])
                soak.events[end] += 1
                suspended += [job] if end == "SIGSTOP" else []
    for job in suspended:  # another run starts and ends while this one is suspended
        other = crashing.start(fields, LABEL_NEW)
        other.join(_MAX_RUN_S)
        os.kill(job.pid or 0, signal.SIGCONT)
    for job, end in jobs:
        job.join(_MAX_RUN_S)
        if job.is_alive():
            job.kill()
            soak.problems.append("a run did not end")
        elif job.exitcode == crashing.OVERTAKEN:
            soak.events["overtaken run"] += 1
        elif job.exitcode not in _STATUSES[end]:
            soak.problems.append(f"a run ended with {job.exitcode} ({end})")


def _round_on_ray(soak: Soak, url: str) -> None:
    """Runs a job on a local Ray; a worker or the driver is killed during the run."""
    values = [f"storage.endpoint_url={url}", *_fields(), "run.lease_duration_s=3", "read.chunk_images=4"]
    fields = [word for value in values for word in ("--set", value)]
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.label", "--config", os.devnull, "--relabel", "--wait", *fields],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    soak.events["run on Ray"] += 1
    victim = soak.random.choice(["MapWorker", "decode_block", "driver"])
    deadline = time.monotonic() + _MAX_RUN_S
    started: dict[int, str] = {}
    while job.poll() is None and time.monotonic() < deadline:
        now = descendants(job.pid)
        started |= now
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
    time.sleep(1)  # workers end after their driver; two agents of Ray do not
    for pid, command in started.items():
        try:
            if command.encode()[:15] in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" "):
                os.kill(pid, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue


def descendants(ancestor: int) -> dict[int, str]:
    """Returns the commands of the descendants of a process, by process id."""
    listed = subprocess.run(
        ["ps", "-e", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True
    ).stdout
    processes = [line.split(maxsplit=2) for line in listed.splitlines()]
    commands: dict[int, str] = {}
    parents = {ancestor}
    while parents:  # a child may have a smaller id than its parent
        children = {int(pid): command for pid, parent, command in processes if int(parent) in parents}
        commands |= children
        parents = {*children}
    return commands


def is_running(pid: int) -> bool:
    """Returns whether a process exists and is no zombie."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def listening_addresses(pids: Iterable[int]) -> set[str]:
    """Returns the addresses at which the processes accept TCP connections, in hexadecimal."""
    sockets: set[str] = set()
    for pid in pids:
        with suppress(OSError):
            sockets |= {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    rows = [line.split() for line in lines[1:]]
    is_ours = {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}
    return is_ours


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Kill, disturb and restart labeling jobs at random.")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray-every", type=int, default=8, help="run every Nth round on a real Ray")
    arguments = parser.parse_args()
    soak, lost, duplicated = run_soak(arguments.rounds, arguments.seed, arguments.ray_every)
    print(f"rounds: {arguments.rounds}")
    for kind, count in sorted(soak.events.items()):
        print(f"{kind}: {count}")
    print(f"samples at the end: {sum(map(len, soak.samples.values()))}")
    print(f"samples lost: {lost}")
    print(f"samples duplicated: {duplicated}")
    for problem in soak.problems:
        print(problem)
    sys.exit(1 if lost or duplicated or soak.problems else 0)


if __name__ == "__main__":
    main()
