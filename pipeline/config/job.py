"""The configuration of a labeling job: every field that a run depends on, and no secrets."""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cvt.runtimes import RUNTIME_DEVICES, Precision, resolve_precision, supported_precisions
from pipeline.config.base import NameOrUri, PositiveFloat, PositiveInt, Section, ServiceUrl, Uri
from pipeline.config.input import NOT_IN_FINGERPRINT, InputConfig
from pipeline.config.share import Share
from pipeline.config.stages import ClassifyConfig, DecodeConfig, RayConfig, ReadConfig
from pipeline.storage import Storage


class ModelConfig(Section):
    """The checkpoint that classifies, and its precision."""

    path: NameOrUri = Field(examples=["microsoft/cvt-13"])
    """Checkpoint: `fashion-mnist` (bundled), a Hugging Face hub id, or the path or URI of a folder in Hugging
    Face layout, a Microsoft `.pth` file or a TensorFlow `.h5` file.
    """
    revision: str | None = Field(default=None, examples=["main"])
    """Branch, tag or commit of a hub id, as `id@revision` in `model.path`. Null: the default branch."""
    labels: NameOrUri | None = Field(default=None, examples=["s3://my-bucket/classes.txt"])
    """Path or URI of a file with class names that replace the checkpoint's: one name per line, or `.json`
    with a list or an object by class id. Null: the checkpoint's names.
    """
    precision: Literal["auto", Precision] = "fp32"
    """Number format of the model. `auto`: `bf16` if `classify.device` is `cuda`, `fp32` if it is `cpu`.
    Labels depend on this field.
    """


class OutputConfig(Section):
    """The location of the labels, and the content of each row."""

    uri: Uri = Field(examples=["s3://my-bucket/labels"])
    """Folder of the labels. Each model and fingerprint has a folder `model=<name>-<fingerprint>` in it."""
    topk: PositiveInt = 5
    """Number of best classes that each row keeps. A model with fewer classes keeps all of them."""
    embedding: Literal["none", "float16", "float32"] = "none"
    """Type of the column `embedding`, the model's features before the classifier. `none`: no such column."""
    label_names: bool = False
    """Add the columns `target` and `topk_labels`: the names of the target's class and of `topk_label_ids`."""


class ReportConfig(Section):
    """Images in the report. No label depends on this section."""

    gallery: Annotated[int, Field(ge=0, le=20)] = 3
    """Number of images with the highest scores, and with the lowest, per class in the report. 0: none."""
    thumbnail_side: Annotated[int, Field(ge=16, le=512)] = 96
    """Longest side of a thumbnail, in pixels."""


#: A fraction from 0 to 1.
Fraction = Annotated[float, Field(ge=0, le=1)]


class GateConfig(Section):
    """Limits on failures and on drift. No label depends on this section.

    A limit on failures ends a run with exit status 8, and a limit on drift from the previous run with 7.
    """

    max_error_fraction: Fraction | None = 0.5
    """Maximum fraction of error rows among the images of the shards that the run labels. Null: no limit."""
    max_unreadable_fraction: Fraction | None = 0.5
    """Maximum fraction of the shards that cannot be read, of the shards that the run reads. A run that finds
    empty shards and no image exceeds it too. Null: no limit.
    """
    abort: bool = True
    """Stop the run as soon as it is certain to exceed `max_error_fraction` or `max_unreadable_fraction`.
    Complete shards keep their labels.
    """
    canary: Annotated[int, Field(ge=0)] = 0
    """Number of randomly chosen new shards that are labeled first. If they exceed a limit of the gate, the
    other shards are not labeled. 0: no canary.
    """

    max_psi: PositiveFloat | None = Field(default=None, examples=[0.25])
    """Maximum population stability index (PSI) of the classes. 0.1 is commonly called a small shift, and 0.25
    a large one. Null: no limit.
    """
    max_score_psi: PositiveFloat | None = Field(default=None, examples=[0.25])
    """Maximum population stability index (PSI) of the scores. Null: no limit."""
    max_js: Annotated[float, Field(gt=0, le=1)] | None = Field(default=None, examples=[0.2])
    """Maximum Jensen-Shannon distance of the classes, from 0 to 1. Null: no limit."""
    min_images: PositiveInt = 1
    """Minimum number of labeled images of both runs. Smaller runs differ by chance, and are not compared."""


class StorageConfig(Section):
    """Access to object storage. Credentials come from the environment."""

    endpoint_url: ServiceUrl | None = Field(default=None, examples=["https://minio.example.com:9000"])
    """URL of an S3-compatible service. Null: `AWS_ENDPOINT_URL_S3`, or AWS."""
    region: str | None = Field(default=None, examples=["eu-west-1"])
    """Region of the S3 buckets. Null: from the AWS configuration."""
    anonymous: bool = False
    """Access public buckets without credentials. The output must be a local folder."""
    requester_pays: bool = False
    """Pay for the requests to buckets that need it. S3 bills the account of the credentials, and Google Cloud
    Storage the project of the environment.
    """
    request_timeout_s: PositiveFloat = 60
    """Maximum seconds of a request, plus one second for each `min_bytes_per_s` bytes."""
    min_bytes_per_s: PositiveFloat = 64 * 1024
    """Minimum bytes per second of a request. A slower request is canceled, and retried three times."""
    conditional_writes: bool = True
    """Whether the buckets support conditional writes. False: a store without them is accepted, and only one
    run at a time may write to an output. No label depends on this field.
    """


class RunConfig(Section):
    """How a run shares its output with other runs, and how it stops."""

    share: Annotated[str, AfterValidator(lambda text: str(Share.parse(text)))] | None = Field(
        default=None, examples=["1/8"]
    )
    """`i/n`: label only share i of n, so that n runs label one dataset at the same time. Null: all shards. No
    label depends on this field.
    """

    lease_duration_s: PositiveFloat = 60
    """Seconds after which the lease on the output expires if the run does not renew it. The clocks of all
    machines should agree to a fraction of this time.
    """
    grace_period_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20
    """Maximum seconds for finishing started shards after SIGTERM or Ctrl-C."""
    flush_interval_s: PositiveFloat = 30
    """Seconds between writes of the manifest, or more if the writes take a large part of the time."""


class Config(Section):
    """The configuration of a labeling job.

    Loading resolves `auto` in `model.precision` and `decode.device`. The cluster resolves
    `classify.device: auto`, the stored labels and the cluster `classify.runtime: auto`, and each file
    extension `input.format: auto`.
    """

    input: InputConfig
    model: ModelConfig
    output: OutputConfig
    report: ReportConfig = ReportConfig()
    gate: GateConfig = GateConfig()
    storage: StorageConfig = StorageConfig()
    read: ReadConfig = ReadConfig()
    decode: DecodeConfig = DecodeConfig()
    classify: ClassifyConfig = ClassifyConfig()
    run: RunConfig = RunConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _resolve_and_check(self) -> Self:
        device, decoder = self.classify.device, self.decode.device
        for field, value in (("model.precision", self.model.precision), ("decode.device", decoder)):
            if value == device == "auto":
                message = "'auto' needs classify.device to be cpu or cuda: labels depend on this field"
                raise ValueError(f"{field}: {message}")
        precision = resolve_precision(self.model.precision, device)
        if decoder == "auto":
            decoder = "gpu" if device == "cuda" else "cpu"
        if decoder == "gpu" and self.decode.quality == "fast":
            raise ValueError("decode.quality: 'fast' needs decode.device 'cpu'")
        if decoder == "cpu" and self.decode.cpu_share:
            raise ValueError(f"decode.cpu_share: {self.decode.cpu_share:g} needs decode.device 'gpu'")
        for pool in self.classify.each_pool:
            if decoder == "gpu" and pool.device != "cuda":
                raise ValueError(f"decode.device: 'gpu' needs classify.device 'cuda', not {pool.device!r}")
            runtime, precisions = pool.runtime, supported_precisions(pool.runtime)
            needed = RUNTIME_DEVICES.get(runtime, pool.device)
            if pool.device not in (needed, "auto"):
                message = f"{runtime!r} needs classify.device {needed!r}, not {pool.device!r}"
                raise ValueError(f"classify.runtime: {message}")
            if precision not in precisions:
                allowed = " or ".join(precisions)
                message = f"{runtime!r} supports {allowed}, but model.precision is {precision!r}"
                raise ValueError(f"classify.runtime: {message}")
        if self.run.share is not None and not self.storage.conditional_writes:
            raise ValueError("run.share: several runs at once need storage.conditional_writes: true")
        # The sections are frozen, so this cannot assign to their fields.
        object.__setattr__(self, "model", self.model.model_copy(update={"precision": precision}))
        object.__setattr__(self, "decode", self.decode.model_copy(update={"device": decoder}))
        return self

    @property
    def label_settings(self) -> dict[str, Any]:
        """The settings that determine a label, without model, locations and resources.

        Only those without their default, so that more can follow.
        """
        settings: dict[str, Any] = {
            "precision": self.model.precision,
            "output": self.output.model_dump(exclude={"uri"}, exclude_defaults=True),
            "input": self.input.model_dump(exclude=NOT_IN_FINGERPRINT, exclude_defaults=True),
        }
        decoder = [self.decode.device, self.decode.quality, self.decode.cpu_share]
        if not decoder[-1]:
            decoder.pop()
        return settings if decoder == ["cpu", "exact"] else settings | {"decode": decoder}

    def fingerprint(self, checkpoint_digest: str) -> str:
        """Returns the SHA-256 over everything that determines a label, in hexadecimal."""
        settings = self.label_settings | {"checkpoint": checkpoint_digest}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def make_storage(section: StorageConfig) -> Storage:
    """Returns access to the configured storage."""
    return Storage(**section.model_dump())


@dataclass(frozen=True, slots=True)
class Selection:
    """What a run does in addition to labeling new and changed shards.

    Attributes:
        retry_errors: label shards with error rows, and shards that could not be read.
        relabel: label every shard.
        prune: remove the labels of shards that were deleted from the input.
    """

    retry_errors: bool = False
    relabel: bool = False
    prune: bool = False


LABEL_NEW = Selection()
