"""The configuration of a labeling job.

Every field that a run depends on is here and goes whole into the run's record. Secrets don't belong here:
credentials come from the standard chains of each storage service.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cvt.runtimes import Device, Precision, Runtime, precisions_of, resolve_precision
from pipeline.config.sections import Address, NameOrUri, PositiveFloat, PositiveInt, Section, ServiceUrl, Uri
from pipeline.storage import Storage

InputFormat = Literal["auto", "webdataset", "parquet", "images"]


class InputConfig(Section):
    """Where the shards are, and which parts of them are image, label and key."""

    uri: Uri
    format: InputFormat = "auto"
    #: Read the labels of the dataset (targets). If false, every target is null.
    labels: bool = True
    #: WebDataset: the (dotted) field of `.json` with the label; null: the label is in `.cls`.
    label_field: str | None = None
    #: Parquet: names of columns; null: the image column is found by its type.
    image_column: str | None = None
    label_column: str | None = None
    key_column: str | None = None
    #: Larger images become error rows, before they are read (bytes) or decoded (pixels).
    max_image_bytes: PositiveInt = 256 * 1024**2
    max_image_pixels: PositiveInt = 178_956_970  # Pillow's limit against decompression bombs


class ModelConfig(Section):
    """The checkpoint that classifies, and its precision: "auto" is bf16 on a GPU and fp32 on a CPU."""

    #: `fashion-mnist` (in the package), a hub id, or the path or URI of a folder in Hugging Face's layout or
    #: of a file in Microsoft's (.pth) or TensorFlow's (.h5) format.
    path: NameOrUri
    #: Branch, tag or commit of a hub id; `id@revision` does the same.
    revision: str | None = None
    #: Path or URI of a file with class names that replace the checkpoint's: one per line, or .json.
    labels: NameOrUri | None = None
    precision: Literal["auto", Precision] = "fp32"


class OutputConfig(Section):
    """Where the labels are written, and what each row contains."""

    uri: Uri
    topk: PositiveInt = 5
    embedding: Literal["none", "float16", "float32"] = "none"


class ReportConfig(Section):
    """Images in the report; no label depends on them."""

    #: Thumbnails per class: this many highest-confidence and this many lowest-confidence images.
    gallery: Annotated[int, Field(ge=0, le=20)] = 3
    #: Longest side of a thumbnail in pixels.
    thumbnail_side: Annotated[int, Field(ge=16, le=512)] = 96


class GateConfig(Section):
    """Limits on drift from the previous run. Null: no limit. Exceeding one sets the exit status."""

    #: Population stability index of classes and of scores; 0.1 is often called small, 0.25 large.
    max_psi: PositiveFloat | None = None
    max_score_psi: PositiveFloat | None = None
    #: Jensen-Shannon distance of the classes, from 0 to 1.
    max_js: Annotated[float, Field(gt=0, le=1)] | None = None
    #: Runs with fewer labeled images are not compared: they differ by chance alone.
    min_images: PositiveInt = 1


class StorageConfig(Section):
    """How to access object storage; credentials come from the environment."""

    endpoint_url: ServiceUrl | None = None
    region: str | None = None


class ReadConfig(Section):
    """Read tasks, and the size of the chunks that they produce."""

    concurrency: PositiveInt | None = None
    num_cpus: PositiveFloat = 0.25
    #: Ranges of one tar, 8 MiB each, that are fetched at once.
    concurrent_fetches: PositiveInt = 4
    #: Images per chunk; null: chosen by the model's size.
    chunk_images: PositiveInt | None = None
    chunk_bytes: PositiveInt = 128 * 1024**2
    #: Bytes of memory that Ray reserves per task; null: chosen by the size of chunks.
    memory: PositiveInt | None = None


#: The error message where a GPU is configured to decode, and torchvision is missing.
NO_TORCHVISION = (
    "install the torchvision that fits this PyTorch (pip install 'cvt-label[gpu]'), or set decode.device: cpu"
)


class DecodeConfig(Section):
    """How images are decoded, and the decode tasks."""

    #: "gpu": the classifier decodes JPEG on its GPU (torchvision); "auto": gpu if classify.device is cuda.
    device: Literal["cpu", "gpu", "auto"] = "cpu"
    #: "fast": a JPEG at least twice as large as needed is decoded at a half, a quarter or an eighth.
    quality: Literal["exact", "fast"] = "exact"
    num_cpus: PositiveFloat | None = None
    memory: PositiveInt | None = None


class ClassifyConfig(Section):
    """Classifier actors; null values are chosen from the resources of the cluster."""

    device: Device = "auto"
    #: What runs the model: PyTorch, compiled PyTorch, or OpenVINO (on CPUs; cvt-label[openvino]).
    runtime: Runtime = "torch"
    num_gpus: PositiveFloat | None = None
    num_cpus: PositiveFloat | None = None
    min_actors: PositiveInt = 1
    max_actors: PositiveInt | None = None
    #: Images per batch of the model; null: chosen by the model's size.
    batch_size: PositiveInt | None = None
    #: Chunks that an actor holds at once: one is computed, while others are decoded or turned into rows.
    concurrent_chunks: PositiveInt = 2
    #: Threads of an actor on a CPU.
    threads: PositiveInt | None = None

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors {self.max_actors} is below min_actors {self.min_actors}")
        return self


#: As `ray.address`: the job runs in threads of its own process, without Ray.
IN_PROCESS = "in-process"


class RayConfig(Section):
    """The Ray cluster that runs the job, and its limits."""

    #: null: the cluster of `RAY_ADDRESS`, which Ray sets for submitted jobs, or else a local Ray.
    #: `in-process`: no Ray; threads of this process run all stages.
    address: Address | None = None
    #: A run without progress for this long ends with an error; one chunk must take less.
    no_progress_timeout_s: PositiveFloat = 900
    #: Fraction of Ray's object store that chunks between the stages may fill.
    object_store_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    #: A stage pauses when its waiting output exceeds this multiple of what the next stage is processing.
    backpressure_ratio: PositiveFloat = 2.0
    #: Chunks sent to an actor before it has finished the previous one, so that it does not wait.
    chunks_in_flight: PositiveInt = 4
    #: How often work on one chunk or shard is repeated after its worker or node has died.
    task_retries: Annotated[int, Field(ge=0)] = 3
    #: Consecutive actors that may die while they start.
    actor_start_retries: Annotated[int, Field(ge=0)] = 3

    @field_validator("address")
    @classmethod
    def _is_address(cls, address: str | None) -> str | None:
        if address is None or ":" in address or address in ("auto", "local", IN_PROCESS):
            return address
        raise ValueError(f"not an address: host:port, ray://host:port, auto, local or {IN_PROCESS}")


class RunConfig(Section):
    """How a run shares its output with other runs, and how it stops."""

    #: The lease on the output expires after this time; clocks should agree to a fraction of it.
    lease_duration_s: PositiveFloat = 60
    #: After SIGTERM or Ctrl-C, started shards may be finished for this long.
    grace_period_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20
    #: Interval between writes of the manifest, as long as they take little of the time.
    flush_interval_s: PositiveFloat = 30


class Config(Section):
    """The configuration of a labeling job.

    Loading replaces "auto" as precision and as decoder. `classify.device: auto` is left to the cluster, and
    `input.format: auto` to each object.
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
    def _fields_fit(self) -> Self:
        device, decoder = self.classify.device, self.decode.device
        for field, value in (("model.precision", self.model.precision), ("decode.device", decoder)):
            if value == device == "auto":
                message = "'auto' needs classify.device to be cpu or cuda: labels depend on this field"
                raise ValueError(f"{field}: {message}")
        precision = resolve_precision(self.model.precision, device)
        if decoder == "auto":
            decoder = "gpu" if device == "cuda" else "cpu"
        if decoder == "gpu" and device != "cuda":
            raise ValueError(f"decode.device: 'gpu' needs classify.device 'cuda', and it is {device!r}")
        if decoder == "gpu" and self.decode.quality == "fast":
            raise ValueError("decode.quality: 'fast' is for the CPU, and decode.device is the GPU")
        runtime, precisions = self.classify.runtime, precisions_of(self.classify.runtime)
        if runtime == "openvino" and device == "cuda":
            raise ValueError("classify.runtime: 'openvino' is for CPUs, and classify.device is 'cuda'")
        if precision not in precisions:
            allowed = " or ".join(precisions)
            message = f"{runtime!r} computes in {allowed}, and model.precision is {precision!r}"
            raise ValueError(f"classify.runtime: {message}")
        # Sections are frozen from here on.
        object.__setattr__(self, "model", self.model.model_copy(update={"precision": precision}))
        object.__setattr__(self, "decode", self.decode.model_copy(update={"device": decoder}))
        return self

    @property
    def label_settings(self) -> dict[str, Any]:
        """The settings that determine a label, whatever the model: no place, and no share of the work."""
        settings: dict[str, Any] = {
            "precision": self.model.precision,
            "output": self.output.model_dump(exclude={"uri"}),
            "input": self.input.model_dump(exclude={"uri", "format"}),
        }
        decoder = self.decode.device, self.decode.quality
        return settings if decoder == ("cpu", "exact") else settings | {"decode": decoder}

    def fingerprint(self, checkpoint_digest: str) -> str:
        """Returns the SHA-256 over everything that determines a label, in hexadecimal."""
        whole = self.label_settings | {"checkpoint": checkpoint_digest}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def make_storage(section: StorageConfig) -> Storage:
    """Returns access to the configured storage."""
    return Storage(endpoint_url=section.endpoint_url, region=section.region)


@dataclass(frozen=True, slots=True)
class Selection:
    """The shards that a run labels in addition to new and changed ones.

    Attributes:
        retry_errors: shards with error rows, and shards that could not be read.
        relabel: every shard.
        prune: remove the labels of shards that are deleted from the input.
    """

    retry_errors: bool = False
    relabel: bool = False
    prune: bool = False


#: New and changed shards only.
LABEL_NEW = Selection()
