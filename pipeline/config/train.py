"""The configuration of a training job."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from pipeline.config.base import NameOrUri, PositiveFloat, PositiveInt, Section, Uri
from pipeline.config.input import InputConfig
from pipeline.config.job import Fraction, StorageConfig
from pipeline.config.stages import RayConfig


class ArchitectureConfig(Section):
    """A new model: its classes, architecture and preprocessing."""

    labels: Annotated[list[str], Field(min_length=2)] = Field(examples=[["cat", "dog"]])
    """Names of the classes, in the order of class ids."""
    preset: str | None = Field(default=None, examples=["cvt-13"])
    """Published variant: `cvt-13`, `cvt-21` or `cvt-w24`. `cvt` and `preprocessor` override its fields. Null:
    `cvt` describes the architecture.
    """
    cvt: dict[str, Any] = Field(default={}, examples=[{"embed_dim": [64, 192, 384], "depth": [1, 2, 10]}])
    """Fields of `CvtConfig`, as in `config.json`."""
    preprocessor: dict[str, Any] = Field(default={}, examples=[{"size": {"shortest_edge": 224}}])
    """Fields of `preprocessor_config.json`, such as `size`, `crop_pct` and `image_mean`."""


class TrainedModelConfig(Section):
    """The model to train: either a new model, or a checkpoint to fine-tune."""

    new: ArchitectureConfig | None = None
    """A new model with random weights. Null: `model.pretrained` is the model."""
    pretrained: NameOrUri | None = Field(default=None, examples=["microsoft/cvt-13"])
    """Checkpoint to fine-tune, as `model.path` of a labeling job. Null: `model.new` is the model."""
    revision: str | None = Field(default=None, examples=["main"])
    """Branch, tag or commit of the hub id in `model.pretrained`. Null: the default branch."""
    labels: Annotated[list[str], Field(min_length=2)] | None = Field(default=None, examples=[["cat", "dog"]])
    """Names of the classes to fine-tune on, in the order of class ids. If they differ from the checkpoint's
    names, the classifier starts with random weights. Null: the checkpoint's names.
    """

    @model_validator(mode="after")
    def _check_one_model(self) -> Self:
        if (self.new is None) == (self.pretrained is None):
            raise ValueError("set either model.new or model.pretrained")
        if self.new is not None and self.labels is not None:
            raise ValueError("set model.new.labels instead of model.labels: the model is new")
        return self


class OptimizationConfig(Section):
    """AdamW with a linear warm-up and a cosine decay to zero, and light augmentation."""

    epochs: PositiveInt = 20
    """Number of passes over the training images."""
    batch_size: PositiveInt = 128
    """Number of images per step and worker."""
    learning_rate: PositiveFloat = 1e-3
    """Maximum learning rate, reached after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay of matrices and filters. Biases and normalizations have none."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    """Length of the linear warm-up, in epochs. Fractions are allowed."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Label smoothing of the cross-entropy loss."""
    max_grad_norm: PositiveFloat = 1.0
    """Norm to which gradients are clipped."""
    horizontal_flip: bool = True
    """Mirror half of the images horizontally."""
    max_shift: Annotated[int, Field(ge=0)] = 0
    """Maximum random shift of an image, in pixels, horizontally and vertically."""
    shuffle_buffer: PositiveInt = 20_000
    """Number of images of a worker's shuffle buffer, which holds at most 1 GiB of pixels. The order of the
    shards, and of blocks of cached images, is random too.
    """
    seed: int = 0
    """Seed of weights, order and augmentation."""


class WorkersConfig(Section):
    """Training workers."""

    count: Annotated[int, Field(ge=0)] = 1
    """Number of workers. 0: train in the process of the command, which starts faster."""
    use_gpu: bool = False
    """Give each worker one GPU."""
    threads: PositiveInt | None = None
    """CPU threads of each worker. Null: the CPUs of the node, divided by its workers."""


class TrainOutputConfig(Section):
    """The location of the training state and of the trained model."""

    uri: Uri = Field(examples=["s3://my-bucket/training"])
    """Folder that every worker can access. A rerun resumes from it."""
    name: str = "train"
    """Name of the training. Its state and its model are in the folder `<uri>/<name>`."""
    checkpoint_interval_s: PositiveFloat = 300
    """Seconds between writes of the training state within an epoch. An interrupted training repeats at most
    the steps of this time. The state is also written after each epoch.
    """


class TrainConfig(Section):
    """The configuration of a training job."""

    train: InputConfig
    validation: InputConfig
    model: TrainedModelConfig
    optimization: OptimizationConfig = OptimizationConfig()
    workers: WorkersConfig = WorkersConfig()
    output: TrainOutputConfig
    cache: bool = True
    """Keep decoded images for all epochs, in Ray's object store and on its disk. False: decode each epoch."""
    max_skipped_fraction: Fraction = 0.5
    """Maximum fraction of the images of a section that cannot be used: without a target, with a target that
    is no class of the model, or not decodable. A larger fraction ends the training before the first epoch.
    """
    storage: StorageConfig = StorageConfig()
    ray: RayConfig = RayConfig()

    @property
    def folder(self) -> str:
        """URI of the folder of the training."""
        return f"{self.output.uri}/{self.output.name}"

    @property
    def model_uri(self) -> str:
        """URI of the folder of the best model."""
        return f"{self.folder}/model"

    @property
    def state_uri(self) -> str:
        """URI of the state that a rerun resumes from."""
        return f"{self.folder}/state.pt"

    @property
    def images_per_step(self) -> int:
        """Number of images per step of all workers."""
        return self.optimization.batch_size * max(1, self.workers.count)
