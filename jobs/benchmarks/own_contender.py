"""The pipeline as the benchmark runs it: `python -m jobs.own_contender TASK.json`.

A module of its own, which imports no more than `cvt-label label` does: start-up is measured too.
"""

from __future__ import annotations

import sys
from typing import Any

from jobs.benchmarks.peers import Task
from pipeline.config import Config, load_config
from pipeline.run import label as label_dataset


def task_config(task: Task) -> Config:
    """The pipeline's configuration for a task.

    Raises:
        ConfigError: an override can't be used.
    """
    settings = {
        "input.uri": task.tars,
        "input.labels": "false",
        "model.path": task.model,
        "model.precision": task.precision,
        "output.uri": task.output,
        "classify.device": task.device,
        "classify.batch_size": str(task.batch_size),
    }
    if task.device == "cuda":
        settings["classify.max_actors"] = "1"  # one GPU, as the others take
    return load_config(Config, None, [f"{n}={v}" for n, v in settings.items()] + list(task.overrides))


def label(task: Task) -> None:
    """Our own contender: the whole job, as `cvt-label label` runs it."""
    done = 0

    def note(progress: Any, plan: Any) -> None:
        nonlocal done
        if progress.images > done:
            task.labelled(progress.images - done)
            done = progress.images

    config = task_config(task)
    task.labelled(0)  # the clock of the run's record starts now
    label_dataset(config, on_progress=note)


if __name__ == "__main__":
    label(Task.read(sys.argv[1]))
