"""The configuration of jobs: fields and their types, loading, and what determines a label.

Whatever acts on a configuration does not belong here.
"""

from pipeline.config.job import (
    IN_PROCESS,
    LABEL_NEW,
    NO_TORCHVISION,
    ClassifyConfig,
    Config,
    DecodeConfig,
    InputConfig,
    InputFormat,
    RayConfig,
    ReadConfig,
    Selection,
    make_storage,
)
from pipeline.config.loading import load_config, load_job_config, load_recorded, load_train_config
from pipeline.config.schedule import DatasetConfig, ScheduleConfig, SubmitConfig
from pipeline.config.sections import ConfigError
from pipeline.config.train import OptimizationConfig, TrainConfig
