"""The configuration of a training job."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from pipeline.config.job import InputConfig, RayConfig, StorageConfig
from pipeline.config.sections import NameOrUri, PositiveFloat, PositiveInt, Section, Uri


class ArchitectureConfig(Section):
    """A new model: fields of `CvtConfig`, and its preprocessing."""

    #: Names of the classes, by class id.
    labels: Annotated[list[str], Field(min_length=1)]
    #: A published variant: cvt-13, cvt-21 or cvt-w24; `cvt` and `preprocessor` override its fields.
    preset: str | None = None
    #: Fields of `CvtConfig`, such as `embed_dim` and `depth`.
    cvt: dict[str, Any] = Field(default_factory=dict)
    #: Fields of `preprocessor_config.json`, such as `size`, `crop_pct` and `image_mean`.
    preprocessor: dict[str, Any] = Field(default_factory=dict)


class TrainedModelConfig(Section):
    """The model to train: a new one, or a checkpoint to fine-tune."""

    new: ArchitectureConfig | None = None
    #: A checkpoint, as `model.path` of a labeling job. If `labels` differ from its own, its head is reset.
    pretrained: NameOrUri | None = None
    revision: str | None = None
    labels: list[str] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.new is None) == (self.pretrained is None):
            raise ValueError("give either model.new or model.pretrained")
        if self.new is not None and self.labels is not None:
            raise ValueError("the labels of a new model are model.new.labels")
        return self


class OptimizationConfig(Section):
    """AdamW with a linear warm-up and a cosine decay to zero, and light augmentation."""

    epochs: PositiveInt = 20
    #: Images per step and worker.
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_grad_norm: PositiveFloat = 1.0
    #: Mirror half of the images.
    horizontal_flip: bool = True
    #: Shift each image by up to this many pixels, horizontally and vertically.
    max_shift: Annotated[int, Field(ge=0)] = 0
    seed: int = 0


class WorkersConfig(Section):
    """Training workers."""

    count: PositiveInt = 1
    use_gpu: bool = False
    #: CPU threads of each worker; null: all that the machine has.
    threads: PositiveInt | None = None


class TrainOutputConfig(Section):
    """Where training stores its state and the model."""

    #: Folder that every worker can access (Ray Train's storage path); a rerun resumes from it.
    uri: Uri
    name: str = "train"


class TrainConfig(Section):
    """The configuration of a training job."""

    train: InputConfig
    validation: InputConfig
    model: TrainedModelConfig
    optimization: OptimizationConfig = OptimizationConfig()
    workers: WorkersConfig = WorkersConfig()
    output: TrainOutputConfig
    #: Keep decoded images in Ray's object store (and on its disk) instead of decoding them every epoch.
    cache: bool = True
    storage: StorageConfig = StorageConfig()
    ray: RayConfig = RayConfig()
