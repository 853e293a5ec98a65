"""The configuration of jobs: fields and their types, loading, and what determines a label.

Whatever acts on a configuration does not belong here.
"""

from pipeline.config.identity import fingerprint, label_settings
from pipeline.config.job import (
    LABEL_NEW,
    NO_TORCHVISION,
    Config,
    InputConfig,
    RayConfig,
    Selection,
    make_storage,
)
from pipeline.config.loading import load_config, load_recorded
from pipeline.config.schedule import DatasetConfig, DatasetsConfig
from pipeline.config.sections import ConfigError
from pipeline.config.train import OptimizationConfig, TrainConfig

__all__ = [
    "LABEL_NEW",
    "NO_TORCHVISION",
    "Config",
    "ConfigError",
    "DatasetConfig",
    "DatasetsConfig",
    "InputConfig",
    "OptimizationConfig",
    "RayConfig",
    "Selection",
    "TrainConfig",
    "fingerprint",
    "label_settings",
    "load_config",
    "load_recorded",
    "make_storage",
]
