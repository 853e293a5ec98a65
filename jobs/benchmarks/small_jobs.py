"""Measures the start and the end of small jobs, as whole commands: `cvt-label benchmark start`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

import jobs
from jobs import console
from jobs.benchmarks import figures
from jobs.benchmarks.contenders import PIPELINE
from jobs.benchmarks.end_to_end import make_dataset
from jobs.benchmarks.runs import check_labels
from jobs.reference import load_model
from pipeline.config import IN_PROCESS

_MODEL = "fashion-mnist"
_SAMPLE = Path(jobs.__file__).parent / "data" / "fashion-mnist"

#: The phases of `label`: the event that ends each, an event of the run record or of the process, and what the
#: command does until then.
PHASES = {
    "label": "imports of the command",
    "checkpoint_opened": "listing, checkpoint",
    "planned": "lease, manifest, plan",
    "model_loaded": "import of PyTorch, weights",
    "executor_ready": "start of Ray",
    "first_result": "imports and models of workers, first chunk",
    "first_commit": "other chunks and commit of the first shard",
    "executor_stopped": "other shards, end of Ray",
    "summarized": "statistics and report",
    "ended": "run record",
    "exit": "end of the process",
}
#: The commands after the first `label`, by name. All but the last have an option `--config`.
_OTHERS = {
    "label, nothing new": ["label"],
    "plan": ["plan"],
    "stats": ["stats"],
    "--help": ["--help"],
}
#: The version that runs this benchmark, and the one to compare with.
THIS, OTHER = "this version", "other version"


def start(
    context: typer.Context,
    count: Annotated[int, typer.Option(metavar="N", min=2, help="Number of images.")] = 1000,
    rounds: figures.RoundsOption = 3,
    against: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Checkout of another version to compare with, in turn."),
    ] = None,
    ray: Annotated[bool, typer.Option(help="Measure with a local Ray too.")] = True,
    timeout: Annotated[
        float, typer.Option(metavar="N", min=0, help="Maximum duration of one command, in seconds.")
    ] = 600,
    output: figures.OutputOption = None,
) -> None:
    """Measure the duration of small jobs, by phase.

    Runs whole commands on images of Fashion-MNIST: `label` in one process and on a local Ray, `label` with
    nothing new, `plan`, `stats` and `--help`. The labels are counted. Figures are seconds.

    More exit statuses: 1 if a command failed or lost images.
    """
    versions = {THIS: Path(jobs.__file__).parents[1]}
    if against is not None:
        if not (against / "jobs" / "cli.py").is_file():
            raise typer.BadParameter(f"{against} has no jobs/cli.py", param_hint="--against")
        versions[OTHER] = against.absolute()
    executors = {"in process": IN_PROCESS} | ({"local Ray": "local"} if ray else {})
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    events: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        folder = Path(temporary)
        make_dataset(str(_SAMPLE), folder / "tars", load_model(_MODEL, None).preprocessor, count, cores=1)
        for turn in range(rounds + 1):
            name = f"round {turn} of {rounds}" if turn else "warm-up"
            for version, root in versions.items():
                console.print_notice(f"{name}: {version}")
                for executor, address in executors.items():
                    found = _measure_label(folder, root, address, count, timeout)
                    if turn:  # the first round reads the packages from the disk
                        events[version, executor].append(found)
                        seconds[version, f"label, {executor}"].append(found["exit"])
                for command, words in _OTHERS.items():
                    options = [] if command == "--help" else ["--config", str(folder / "job.json")]
                    duration = _run([*words, *options], root, folder, timeout)
                    if turn:
                        seconds[version, command].append(duration)
    commands = [name for version, name in seconds if version == THIS]
    figures.print_results(
        context,
        output,
        commands=[_command_row(name, seconds) for name in commands],
        phases=[_phase_row(event, events) for event in PHASES],
        seconds_from_the_start=[_event_row(event, events) for event in PHASES],
    )


def _measure_label(folder: Path, root: Path, address: str, count: int, timeout: float) -> dict[str, float]:
    """Labels the tars into an empty folder; returns the seconds from the command to each event."""
    labels = folder / "labels"
    shutil.rmtree(labels, ignore_errors=True)
    config = {
        "input": {"uri": str(folder / "tars"), "labels": False},
        "model": {"path": _MODEL},
        "output": {"uri": str(labels)},
        "ray": {"address": address},
    }
    (folder / "job.json").write_text(json.dumps(config))
    before = time.time()
    duration = _run(["label", "--config", str(folder / "job.json")], root, folder, timeout)
    check_labels(PIPELINE, str(labels), count)
    [record] = labels.glob("model=*/runs/*.json")
    return command_events(json.loads(record.read_text()), before, duration)


def command_events(record: Mapping[str, Any], before: float, duration: float) -> dict[str, float]:
    """Returns the seconds from a command to each event of its run and to its end.

    Args:
        record: the run record.
        before: time of the start of the command, in seconds since the epoch.
        duration: seconds from the start to the end of the command.
    """
    timings = record["timings"]
    # `started_at` is the time of the record, and not of the start of the run.
    begin = datetime.fromisoformat(record["ended_at"]).timestamp() - timings["ended"] - before
    return {"label": begin} | {event: begin + s for event, s in timings.items()} | {"exit": duration}


def phase_seconds(events: Mapping[str, float]) -> dict[str, float]:
    """Returns the duration of each phase by the event that ends it.

    The time of a phase whose event the version does not record is part of the next phase.
    """
    known = [event for event in PHASES if event in events]
    durations = {after: events[after] - events[before] for before, after in pairwise(known)}
    return {known[0]: events[known[0]]} | durations


def _run(words: Sequence[str], root: Path, folder: Path, timeout: float) -> float:
    """Runs a command of a checkout; returns its duration in seconds."""
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    log, start = folder / "log", time.monotonic()
    with log.open("wb") as file:
        try:
            subprocess.run(
                [sys.executable, "-m", "jobs.cli", *words],
                stdout=file, stderr=file, env=environment, cwd=folder, timeout=timeout, check=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise figures.BenchmarkError(f"{words[0]}: took more than {timeout:g} s") from None
        except subprocess.CalledProcessError as error:
            log_text = log.read_text(errors="replace")
            raise figures.BenchmarkError(f"{words[0]}: exit status {error.returncode}: {log_text}") from None
    return time.monotonic() - start


def _command_row(command: str, seconds: Mapping[tuple[str, str], Sequence[float]]) -> dict[str, Any]:
    ours, theirs = seconds[THIS, command], seconds.get((OTHER, command), [])
    return {
        "command": command,
        "seconds": ours,
        "other_seconds": theirs,
        "fraction_of_other": figures.ratios(ours, theirs),
    }


def _phase_row(event: str, events: Mapping[tuple[str, str], Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    values = {key: [phase_seconds(found).get(event) for found in rounds] for key, rounds in events.items()}
    return {"phase": PHASES[event]} | _columns(values)


def _event_row(event: str, events: Mapping[tuple[str, str], Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    values = {key: [found.get(event) for found in rounds] for key, rounds in events.items()}
    return {"event": event.replace("_", " ")} | _columns(values)


def _columns(values: Mapping[tuple[str, str], Sequence[float | None]]) -> dict[str, list[float]]:
    """Returns a field for each version and executor, sorted by executor."""
    return {
        f"{executor}{', other' if version == OTHER else ''}": [each for each in rounds if each is not None]
        for (version, executor), rounds in sorted(values.items(), key=lambda item: item[0][1])
    }
