"""The configuration of jobs: fields and their types, loading, JSON Schema, and what determines a label.

Code that acts on a configuration does not belong here.
"""

from pipeline.config.base import ConfigError, check_environment
from pipeline.config.input import InputConfig, InputFormat
from pipeline.config.job import LABEL_NEW, Config, GateConfig, ReportConfig, Selection, make_storage
from pipeline.config.loading import load_config, load_job_config, load_train_config
from pipeline.config.schedule import DatasetConfig, ScheduleConfig, SubmitConfig
from pipeline.config.schema import KINDS, json_schema
from pipeline.config.share import WHOLE, Share
from pipeline.config.stages import (
    IN_PROCESS,
    NO_TORCHVISION,
    ClassifyConfig,
    DecodeConfig,
    RayConfig,
    ReadConfig,
)
from pipeline.config.train import OptimizationConfig, TrainConfig
from pipeline.config.uris import InputUris, UriPattern
