"""Label image datasets in batch: the public Python API.

    from pipeline import label, load_job_config

    result = label(load_job_config("job.yaml"))
    for table in result.partition.read_labels(["key", "label", "score"]):
        ...

Everything else in this package is internal. Names are imported when they are first used, so that programs
that only read labels import neither PyTorch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.commit import Partition, open_partition
    from pipeline.compare import compare_labels
    from pipeline.config import Config, Selection, TrainConfig, load_job_config, load_train_config
    from pipeline.decode import open_image
    from pipeline.publish import publish_labels
    from pipeline.run import RunResult, find_partition, label, write_report
    from pipeline.run import plan_run as plan
    from pipeline.train import train_model

__version__ = "0.1.0"

#: The packages that have the public names; those that import least come first.
_PACKAGES = ("config", "commit", "decode", "compare", "publish", "run", "train")

__all__ = [
    "Config",
    "Partition",
    "RunResult",
    "Selection",
    "TrainConfig",
    "compare_labels",
    "find_partition",
    "label",
    "load_job_config",
    "load_train_config",
    "open_image",
    "open_partition",
    "plan",
    "publish_labels",
    "train_model",
    "write_report",
]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    if name in __all__:
        internal = "plan_run" if name == "plan" else name
        for package in _PACKAGES:
            module = importlib.import_module(f"pipeline.{package}")
            if hasattr(module, internal):
                return getattr(module, internal)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
