"""The job's configuration: strict YAML into frozen, typed sections.

Every field that a run depends on is here and nowhere else, and goes whole into the run record. Secrets
don't belong here: credentials come from the standard chains of each storage service.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import (
    Field,
    model_validator,
)

from cvt.runtimes import Device, Precision, Runtime, precisions_of
from pipeline.config.loading import StrictLoader
from pipeline.config.sections import Address, PositiveFloat, PositiveInt, Section, ServiceUrl
from pipeline.storage import Storage

StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class InputConfig(Section):
    """Where the shards are, and what in them is an image, a label and a key."""

    uri: Annotated[Address, Field(min_length=1)]
    format: Literal["auto", "webdataset", "parquet", "images"] = "auto"
    #: Read the samples' own labels (targets). Without, every target is null.
    labels: bool = True
    #: WebDataset: the (dotted) field of `.json` that holds the label; `.cls` is read where it is null.
    label_field: str | None = None
    #: Parquet: the columns' names. The image column is found by its type where it is null.
    image_column: str | None = None
    label_column: str | None = None
    key_column: str | None = None
    #: Larger encoded images and larger pictures become error rows, before they are read or decoded.
    max_image_bytes: PositiveInt = 256 * 1024**2
    max_image_pixels: PositiveInt = 178_956_970  # Pillow's own limit against decompression bombs


class ModelConfig(Section):
    """Which checkpoint classifies, and in which precision: "auto" is bf16 on a GPU and fp32 on a CPU."""

    #: `fashion-mnist` (in the package), a hub id, or the path or URI of a folder in Hugging Face's layout or
    #: of a file of Microsoft's (.pth) or TensorFlow's (.h5).
    path: Annotated[Address, Field(min_length=1)]
    #: Of a hub id, which may also have it behind an @.
    revision: str | None = None
    #: Path or URI of a file with the classes' names, instead of the checkpoint's own: one a line, or .json.
    labels: Annotated[Address, Field(min_length=1)] | None = None
    precision: Literal["auto", Precision] = "fp32"


class OutputConfig(Section):
    """Where the labels go, and what each row holds."""

    uri: Annotated[Address, Field(min_length=1)]
    topk: PositiveInt = 5
    embedding: Literal["none", "float16", "float32"] = "none"


class ReportConfig(Section):
    """What the report shows beside figures; no label depends on it."""

    #: Images of each class that are shown as thumbnails: so many of the surest, and of the least sure.
    gallery: Annotated[int, Field(ge=0, le=20)] = 3
    #: Pixels of a thumbnail's longest side.
    thumbnail_side: Annotated[int, Field(ge=16, le=512)] = 96


class GateConfig(Section):
    """Limits on how a run's labels differ from those of the last run before it; a broken one sets the exit
    status. No label depends on them. What is null has no limit.
    """

    #: Population stability index of the classes, and of the scores; 0.1 is often called small, 0.25 large.
    max_psi: PositiveFloat | None = None
    max_score_psi: PositiveFloat | None = None
    #: Jensen-Shannon distance of the classes, from 0 to 1.
    max_js: Annotated[float, Field(gt=0, le=1)] | None = None
    #: Two runs are compared where both have labelled so many images: few differ by chance alone.
    min_images: PositiveInt = 1


class StorageConfig(Section):
    """How object storage is reached; credentials come from the environment."""

    endpoint_url: ServiceUrl | None = None
    region: str | None = None


class ReadConfig(Section):
    """Read tasks: the number at once, the CPUs of each, and the chunk that flows on from them."""

    concurrency: PositiveInt | None = None
    num_cpus: PositiveFloat = 0.25
    #: Ranges of one tar, of 8 MiB, that are fetched at once.
    fetches: PositiveInt = 4
    #: Images in a chunk; chosen by the model's size where it is null.
    chunk_images: PositiveInt | None = None
    chunk_bytes: PositiveInt = 128 * 1024**2
    #: Bytes that Ray is to keep free for a task; chosen by the size of chunks where it is null.
    memory: PositiveInt | None = None


#: Where the GPU is to decode, and can't.
NO_TORCHVISION = (
    "install the torchvision that fits this PyTorch (pip install 'cvt-label[gpu]'), or set decode.device: cpu"
)


class DecodeConfig(Section):
    """How images are decoded, and the tasks that do it."""

    #: "gpu": by the classifier, JPEG on its GPU (torchvision); "auto": that, where classify.device is cuda.
    device: Literal["cpu", "gpu", "auto"] = "cpu"
    #: "fast": a JPEG twice as large as needed, or larger, is decoded at a half, a quarter or an eighth.
    quality: Literal["exact", "fast"] = "exact"
    num_cpus: PositiveFloat | None = None
    memory: PositiveInt | None = None

    def resolved_device(self, classify_device: str) -> str:
        """Where images are decoded, "cpu" or "gpu", with "auto" resolved."""
        if self.device == "auto":
            return "gpu" if classify_device == "cuda" else "cpu"
        return self.device


class ClassifyConfig(Section):
    """Classifier actors; whatever is null is chosen from what the cluster has."""

    device: Device = "auto"
    #: What runs the model: PyTorch as it is, compiled, or OpenVINO (on CPUs; cvt-label[openvino]).
    runtime: Runtime = "torch"
    num_gpus: PositiveFloat | None = None
    num_cpus: PositiveFloat | None = None
    min_actors: PositiveInt = 1
    max_actors: PositiveInt | None = None
    #: Images that the model gets at once; chosen by the model's size where it is null.
    batch_size: PositiveInt | None = None
    #: Chunks in an actor's hands at once: one is computed, while others are decoded or put into rows.
    chunks_at_once: PositiveInt = 2
    #: Threads of a CPU classifier.
    threads: PositiveInt | None = None

    @model_validator(mode="after")
    def _bounds_in_order(self) -> ClassifyConfig:
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors {self.max_actors} is below min_actors {self.min_actors}")
        return self


class RayConfig(Section):
    """Which Ray runs the job: the submitted job's cluster, an address, or (null) a local one."""

    address: Address | None = None
    #: A run that hangs for so long ends with an error; one chunk must take less.
    no_progress_timeout_s: PositiveFloat = 900
    #: Share of Ray's object store that the chunks between the stages may fill.
    object_store_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    #: A stage pauses where what waits for the next one is so many times what that one has in work.
    backpressure_ratio: PositiveFloat = 2.0
    #: Chunks sent to an actor before it is done with the last, so that none is waited for.
    chunks_in_flight: PositiveInt = 4
    #: Actors in a row that may die while they start.
    actor_start_retries: Annotated[int, Field(ge=0)] = 3
    #: How often a reading or decoding task may die, with its worker or its node.
    task_retries: Annotated[int, Field(ge=0)] = 3
    #: Likewise of a chunk at a classifier. Until Ray knows a node to be lost (after 15 s, if it isn't set),
    #: trying to reach an actor there costs a retry every few seconds, eight in all: 20 last over a minute.
    actor_task_retries: Annotated[int, Field(ge=0)] = 20


class RunConfig(Section):
    """How a run shares its output with others, and how it ends when it is told to."""

    #: The lease on the output holds for so long without renewal; clocks should agree to a fraction of it.
    lease_s: PositiveFloat = 60
    #: After SIGTERM or Ctrl-C, shards that are begun may be finished for so long.
    grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20
    #: The manifest is written as often as this, as long as that takes little of the time.
    flush_s: PositiveFloat = 30


class Config(Section):
    """The whole configuration of a labelling job."""

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
    def _fields_fit(self) -> Config:
        if self.model.precision == "auto" and self.classify.device == "auto":
            raise ValueError(
                "model.precision: 'auto' needs classify.device to be cpu or cuda: precision is part of what "
                "decides a label, and has to be known before the cluster is"
            )
        if self.decode.device == "auto" and self.classify.device == "auto":
            raise ValueError(
                "decode.device: 'auto' needs classify.device to be cpu or cuda: the decoder is part of what "
                "decides a label, and has to be known before the cluster is"
            )
        if self.decode.device == "gpu" and self.classify.device != "cuda":
            raise ValueError(
                f"decode.device: 'gpu' needs classify.device 'cuda', and it is {self.classify.device!r}"
            )
        if self.decode.resolved_device(self.classify.device) == "gpu" and self.decode.quality == "fast":
            raise ValueError("decode.quality: 'fast' is for the CPU, and decode.device is the GPU")
        if self.classify.runtime == "openvino" and self.classify.device == "cuda":
            raise ValueError("classify.runtime: 'openvino' is for CPUs, and classify.device is 'cuda'")
        able = precisions_of(self.classify.runtime)
        if self.model.precision not in ("auto", *able):
            raise ValueError(
                f"classify.runtime: {self.classify.runtime!r} computes in {' or '.join(able)}, and "
                f"model.precision is {self.model.precision!r}"
            )
        return self


def make_storage(section: StorageConfig) -> Storage:
    """The storage that the configuration describes."""
    return Storage(endpoint_url=section.endpoint_url, region=section.region)


@dataclass(frozen=True, slots=True)
class Selection:
    """What a run labels beside shards that are new or have changed.

    Attributes:
        retry_errors: shards with error rows, and those that couldn't be read.
        relabel: every shard.
        prune: remove the labels of shards that are gone.
    """

    retry_errors: bool = False
    relabel: bool = False
    prune: bool = False


#: What is new or has changed, and nothing else.
LABEL_NEW = Selection()
