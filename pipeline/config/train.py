"""The job's configuration: strict YAML into frozen, typed sections.

Every field that a run depends on is here and nowhere else, and goes whole into the run record. Secrets
don't belong here: credentials come from the standard chains of each storage service.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    Field,
    model_validator,
)

from pipeline.config.job import InputConfig, RayConfig, StorageConfig
from pipeline.config.sections import Address, PositiveFloat, PositiveInt, Section


class ArchitectureConfig(Section):
    """A new model: what `CvtConfig` takes, and the preprocessing that it is to be used with."""

    #: The classes' names, by class id.
    labels: Annotated[list[str], Field(min_length=1)]
    #: A published variant: cvt-13, cvt-21 or cvt-w24; what `cvt` and `preprocessor` say comes before it.
    preset: str | None = None
    #: Fields of `CvtConfig`, such as `embed_dim` and `depth`.
    cvt: dict[str, Any] = {}
    #: Fields of `preprocessor_config.json`, such as `size`, `crop_pct` and `image_mean`.
    preprocessor: dict[str, Any] = {}


class TrainedModelConfig(Section):
    """What is trained: a new model, or a checkpoint that is trained further."""

    new: ArchitectureConfig | None = None
    #: A checkpoint as in `model.path`; with `labels` that differ from its own, its head starts anew.
    start: Address | None = None
    revision: str | None = None
    labels: list[str] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> TrainedModelConfig:
        if (self.new is None) == (self.start is None):
            raise ValueError("give either model.new or model.start")
        if self.new is not None and self.labels is not None:
            raise ValueError("the labels of a new model stand in model.new.labels")
        return self


class ScheduleConfig(Section):
    """AdamW with a linear warm-up and a cosine to zero, and light augmentation."""

    epochs: PositiveInt = 20
    #: Images in a step, of each worker.
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    clip_norm: PositiveFloat = 1.0
    #: Mirror half of the images.
    flip: bool = True
    #: Shift each image by up to so many pixels, both ways.
    shift: Annotated[int, Field(ge=0)] = 0
    seed: int = 0


class WorkersConfig(Section):
    """Training workers."""

    count: PositiveInt = 1
    use_gpu: bool = False
    #: CPU threads of each worker; null takes what the machine has.
    threads: PositiveInt | None = None


class TrainOutputConfig(Section):
    """Where training keeps its state, and leaves the model."""

    #: Folder that every worker reaches (Ray Train's storage path); a rerun goes on from what is there.
    path: Annotated[Address, Field(min_length=1)]
    name: str = "train"


class TrainConfig(Section):
    """The whole configuration of a training job."""

    train: InputConfig
    validation: InputConfig
    model: TrainedModelConfig
    schedule: ScheduleConfig = ScheduleConfig()
    workers: WorkersConfig = WorkersConfig()
    output: TrainOutputConfig
    #: Keep the decoded images in Ray's object store (and on its disk), not decode them every epoch.
    cache: bool = True
    storage: StorageConfig = StorageConfig()
    ray: RayConfig = RayConfig()
