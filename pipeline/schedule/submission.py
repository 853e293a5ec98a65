"""A labeling job as it is submitted: its id, its command and its runtime environment.

The job gets nothing of the submitter's environment but its configuration, which contains no secret: the
cluster has its own credentials.
"""

import hashlib
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.config import LABEL_NEW, Config, Selection

CONFIG_VARIABLE = "CVT_LABEL_CONFIG"  # in the job's environment

#: The value of `program` in the metadata of labeling jobs.
PROGRAM = "cvt-label"

#: Seconds that a stopped job has, in addition to `run.grace_s`, to write manifest and statistics.
_STOP_SECONDS = 60
_TICK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True)
class Submission:
    """A job to submit.

    Attributes:
        config: the job's configuration; `ray.address` is ignored: the job runs on the cluster that gets it.
        tick: names the scheduled time. One tick of one dataset and model is one job.
        selection: the shards to label in addition to new ones.
        working_dir, requirements, python: as in `SubmitConfig`.
        wait: wait for other runs on the same labels to end, of another input for example.
    """

    config: Config
    tick: str
    selection: Selection = LABEL_NEW
    working_dir: str | None = None
    requirements: str | None = None
    python: str = "python"
    wait: bool = False

    def __post_init__(self) -> None:
        if not _TICK.fullmatch(self.tick):
            raise ValueError(f"tick {self.tick!r}: expected up to 40 letters, digits, dots, - and _")

    @property
    def id(self) -> str:
        """The submission id: the same for the same input, output, model and tick, and for no other."""
        labels = self._labels
        digest = hashlib.sha256("\n".join(labels.values()).encode()).hexdigest()[:6]
        dataset = labels["input"].partition("://")[2] or labels["input"]
        return f"label-{_slug(dataset)}-{_slug(labels['model'])}-{digest}-{self.tick}"

    @property
    def metadata(self) -> dict[str, str]:
        """What the cluster shows of the job, in addition to its state."""
        return {"program": PROGRAM, **self._labels, "tick": self.tick}

    def has_labels_of(self, metadata: Mapping[str, str]) -> bool:
        """Whether a job with this metadata labels the same dataset with the same model, at any tick."""
        return self._labels.items() <= metadata.items()

    @property
    def entrypoint(self) -> str:
        """The command that the cluster runs. It replaces the shell, so that the job receives the signals."""
        options = {
            "--retry-errors": self.selection.retry_errors,
            "--relabel": self.selection.relabel,
            "--prune": self.selection.prune,
            "--wait": self.wait,
        }
        command = [self.python, "-m", "jobs.label", f"--config=env:{CONFIG_VARIABLE}"]
        return f"exec {shlex.join([*command, *(name for name, given in options.items() if given)])}"

    @property
    def runtime_env(self) -> dict[str, Any]:
        """What Ray sets up for the job on every node."""
        config = self.config.model_copy(update={"ray": self.config.ray.model_copy(update={"address": None})})
        # Without this variable, Ray kills a job 3 seconds after it has told it to stop.
        patience = math.ceil(config.run.grace_s) + _STOP_SECONDS
        variables = {CONFIG_VARIABLE: config.model_dump_json(), "RAY_JOB_STOP_WAIT_TIME_S": str(patience)}
        given = {"env_vars": variables, "working_dir": self.working_dir, "pip": self.requirements}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def _labels(self) -> dict[str, str]:
        config = self.config
        settings = config.label_settings | {"class_names": config.model.labels}
        return {
            "input": config.input.uri,
            "output": config.output.uri,
            "model": config.model.path + (f"@{config.model.revision}" if config.model.revision else ""),
            "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8],
        }


def _slug(name: str, longest: int = 40) -> str:
    """The end of a name in lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[-longest:].strip("-") or "x"


def minute_tick(moment: datetime) -> str:
    """Returns the tick of a moment: its minute in UTC."""
    return f"{moment.astimezone(UTC):%Y%m%dT%H%MZ}"
