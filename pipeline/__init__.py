"""Label image datasets in batch: the public Python API.

    from pipeline import label, load_config

    result = label(load_config("job.yaml"))
    labels = open_labels(result.partition.uri).table(columns=["key", "label", "score"])

Everything else in this package is internal. Names are imported when they are first used, so that programs
which only read labels import neither PyTorch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import compare, load_config, open_labels, publish, report
    from pipeline.commit import Partition
    from pipeline.config import ConfigError, Selection
    from pipeline.config import Config as JobConfig
    from pipeline.run import RunResult, label
    from pipeline.run import plan_run as plan
    from pipeline.storage import StorageError

__version__ = "0.1.0"

_NAMES = {
    "JobConfig": ("pipeline.config", "Config"),
    "ConfigError": ("pipeline.config", "ConfigError"),
    "Partition": ("pipeline.commit", "Partition"),
    "RunResult": ("pipeline.run", "RunResult"),
    "Selection": ("pipeline.config", "Selection"),
    "StorageError": ("pipeline.storage", "StorageError"),
    "compare": ("pipeline.api", "compare"),
    "label": ("pipeline.run", "label"),
    "load_config": ("pipeline.api", "load_config"),
    "open_labels": ("pipeline.api", "open_labels"),
    "plan": ("pipeline.run", "plan_run"),
    "publish": ("pipeline.api", "publish"),
    "report": ("pipeline.api", "report"),
}

__all__ = [
    "ConfigError",
    "JobConfig",
    "Partition",
    "RunResult",
    "Selection",
    "StorageError",
    "compare",
    "label",
    "load_config",
    "open_labels",
    "plan",
    "publish",
    "report",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _NAMES[name]
    return getattr(importlib.import_module(module), attribute)
