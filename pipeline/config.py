"""The job's configuration: strict YAML into frozen, typed sections.

Every field that a run depends on is here and nowhere else, and goes whole into the run record. Secrets
don't belong here: credentials come from the standard chains of each storage service.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cvt.runtimes import Device, Precision, Runtime, precisions_of
from pipeline.text import without_credentials


class ConfigError(ValueError):
    """The configuration can't be used; the message names the file, the line and the field."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_are_sections(cls, values: Any) -> Any:
        """A section of which every line is a comment is null in YAML."""
        if not isinstance(values, dict):
            return values
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        sections = {
            name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, _Section)
        }
        return {name: {} if value is None and name in sections else value for name, value in values.items()}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as everybody writes it: with numbers such as 1e-3, which it takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


#: Marks in a URL: credentials end here; a query, or a fragment, begins.
_SECRET_MARKS = "@?#"
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _holding_no_secret(uri: str) -> str:
    """Refuses credentials before the host of a URI, and signed web addresses; the message shows neither."""
    scheme, separator, rest = uri.partition("://")
    if scheme in ("s3", "gs", "file"):  # a password may have a slash in it, and no bucket's name has a colon
        place, marks = rest.partition("/")[0], "@:"
    else:
        place, marks = rest, _SECRET_MARKS
    if separator and any(mark in place for mark in marks):
        message = "credentials don't belong here, but in the environment: only a plain address does"
        raise PydanticCustomError("secret", message)
    return uri


def _plain_url(url: str) -> str:
    """Refuses whatever has more than scheme, host and port; the message doesn't show it."""
    if any(mark in url for mark in _SECRET_MARKS):
        message = "credentials don't belong here, but in the environment: only scheme, host and port do"
        raise PydanticCustomError("secret", message)
    try:
        _ = urlsplit(url).port
    except ValueError:  # whose message holds the URL
        raise PydanticCustomError("secret", "not a URL") from None
    return url


#: Of a service; it goes into records and messages as it is.
ServiceUrl = Annotated[str, AfterValidator(_plain_url)]
#: A path, a URI or an address; it goes into records and messages as it is.
Address = Annotated[str, AfterValidator(_holding_no_secret)]


class InputConfig(_Section):
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


class ModelConfig(_Section):
    """Which checkpoint classifies, and in which precision: "auto" is bf16 on a GPU and fp32 on a CPU."""

    #: `fashion-mnist` (in the package), a hub id, or the path or URI of a folder in Hugging Face's layout or
    #: of a file of Microsoft's (.pth) or TensorFlow's (.h5).
    path: Annotated[Address, Field(min_length=1)]
    #: Of a hub id, which may also have it behind an @.
    revision: str | None = None
    #: Path or URI of a file with the classes' names, instead of the checkpoint's own: one a line, or .json.
    labels: Annotated[Address, Field(min_length=1)] | None = None
    precision: Literal["auto", Precision] = "fp32"


class OutputConfig(_Section):
    """Where the labels go, and what each row holds."""

    uri: Annotated[Address, Field(min_length=1)]
    topk: PositiveInt = 5
    embedding: Literal["none", "float16", "float32"] = "none"


class ReportConfig(_Section):
    """What the report shows beside figures; no label depends on it."""

    #: Images of each class that are shown as thumbnails: so many of the surest, and of the least sure.
    gallery: Annotated[int, Field(ge=0, le=20)] = 3
    #: Pixels of a thumbnail's longest side.
    thumbnail_side: Annotated[int, Field(ge=16, le=512)] = 96


class GateConfig(_Section):
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


class StorageConfig(_Section):
    """How object storage is reached; credentials come from the environment."""

    endpoint_url: ServiceUrl | None = None
    region: str | None = None


class ReadConfig(_Section):
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


class DecodeConfig(_Section):
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


class ClassifyConfig(_Section):
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


class RayConfig(_Section):
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


class RunConfig(_Section):
    """How a run shares its output with others, and how it ends when it is told to."""

    #: The lease on the output holds for so long without renewal; clocks should agree to a fraction of it.
    lease_s: PositiveFloat = 60
    #: After SIGTERM or Ctrl-C, shards that are begun may be finished for so long.
    grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20
    #: The manifest is written as often as this, as long as that takes little of the time.
    flush_s: PositiveFloat = 30


class Config(_Section):
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


class SubmitConfig(_Section):
    """The Ray cluster that a schedule submits to, and what its jobs need there."""

    #: Of its dashboard, http://head:8265; null: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's.
    address: ServiceUrl | None = None
    #: Local folder with the code, which is uploaded; null where the cluster's image has it.
    working_dir: str | None = None
    #: Local requirements file, of what Ray installs for the job; null where the image has everything.
    requirements: str | None = None
    #: The cluster's interpreter.
    python: Annotated[str, Field(min_length=1)] = "python"
    #: Seconds between two looks at the datasets.
    poll_s: PositiveFloat = 15


class DatasetConfig(Config):
    """One dataset of a schedule: a labelling job, and when it is due."""

    #: Five fields (minute, hour, day of the month, month, day of the week), or @daily and its like.
    cron: str
    timezone: str = "UTC"
    #: Also shards with error rows, or that couldn't be read.
    retry_errors: bool = False
    #: Remove the labels of shards that the input no longer has.
    prune: bool = False

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, cron: str) -> str:
        from croniter import croniter

        fields = cron.split()
        # Its R and H fields are other times for everybody who asks.
        usual = len(fields) == 5 and not any(field[:1] in "rRhH" for field in fields)
        try:
            if usual or (len(fields) == 1 and cron.startswith("@")):
                croniter(cron).get_next()
                return cron
        except ValueError:
            pass
        raise ValueError("not a cron expression of five fields that ever comes")

    @field_validator("timezone")
    @classmethod
    def _is_timezone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ValueError, OSError, LookupError):
            raise ValueError("not a time zone, such as Europe/Berlin") from None
        return name

    @property
    def job(self) -> Config:
        """The labelling job alone."""
        return Config.model_validate(self.model_dump(include=set(Config.model_fields)))


DatasetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class DatasetsConfig(_Section):
    """A list of datasets, each with its own input, model, output and schedule."""

    submit: SubmitConfig = SubmitConfig()
    #: Fields of every dataset that doesn't have them itself.
    defaults: dict[str, Any] = {}
    datasets: Annotated[dict[DatasetName, DatasetConfig], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _defaults_are_inherited(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        defaults, datasets = values.get("defaults") or {}, values.get("datasets")
        if not isinstance(defaults, dict) or not isinstance(datasets, dict):
            return values
        whole = {name: _over(defaults, {} if own is None else own) for name, own in datasets.items()}
        return values | {"defaults": defaults, "datasets": whole}


def _over(defaults: Mapping[str, Any], own: Any) -> Any:
    """A dataset's own fields over the common ones, field by field of each section."""
    if not isinstance(own, dict):
        return own
    merged = dict(defaults)
    for name, value in own.items():
        common = merged.get(name)
        if isinstance(common, dict) and isinstance(value, dict):
            value = common | value
        merged[name] = value
    return merged


class ArchitectureConfig(_Section):
    """A new model: what `CvtConfig` takes, and the preprocessing that it is to be used with."""

    #: The classes' names, by class id.
    labels: Annotated[list[str], Field(min_length=1)]
    #: A published variant: cvt-13, cvt-21 or cvt-w24; what `cvt` and `preprocessor` say comes before it.
    preset: str | None = None
    #: Fields of `CvtConfig`, such as `embed_dim` and `depth`.
    cvt: dict[str, Any] = {}
    #: Fields of `preprocessor_config.json`, such as `size`, `crop_pct` and `image_mean`.
    preprocessor: dict[str, Any] = {}


class TrainedModelConfig(_Section):
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


class ScheduleConfig(_Section):
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


class WorkersConfig(_Section):
    """Training workers."""

    count: PositiveInt = 1
    use_gpu: bool = False
    #: CPU threads of each worker; null takes what the machine has.
    threads: PositiveInt | None = None


class TrainOutputConfig(_Section):
    """Where training keeps its state, and leaves the model."""

    #: Folder that every worker reaches (Ray Train's storage path); a rerun goes on from what is there.
    path: Annotated[Address, Field(min_length=1)]
    name: str = "train"


class TrainConfig(_Section):
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


SectionT = TypeVar("SectionT", bound=BaseModel)


def load_config(kind: type[SectionT], path: str | Path | None, overrides: Iterable[str] = ()) -> SectionT:
    """Reads a YAML file as `kind` and applies `section.field=value` overrides, in order.

    Without a path, the overrides alone make the configuration. `env:NAME` for a path reads the variable
    NAME of the environment: so a job carries its configuration.

    Raises:
        ConfigError: unreadable file, not YAML, an unknown or ill-typed field, a missing one. The
            message lists every fault, each with its field, and its line where the file has one.
    """
    return load_recorded(kind, path, overrides)[0]


def load_recorded(
    kind: type[SectionT], path: str | Path | None, overrides: Iterable[str] = ()
) -> tuple[SectionT, Mapping[str, Any]]:
    """As `load_config`; of the record of a run, also the record, which else is empty.

    The commit of a hub's model that the run has used is the model's revision, unless an override names
    another model or revision.
    """
    source = str(path) if path is not None else "configuration"
    values, lines = _read_yaml(Path(path)) if path is not None else ({}, {})
    record: dict[str, Any] = {}
    if {"run", "fingerprint", "config"} <= values.keys():
        record, values = values, values["config"]
        lines = {field[1:]: line for field, line in lines.items() if field[0] == "config"}
    recorded_model = _model_asked_for(values)
    for override in overrides:
        _apply(values, override)
        lines[_fields(override)] = 0  # no line's fault
    commit = record.get("model_commit")
    if commit is not None and _model_asked_for(values) == recorded_model is not None:
        values["model"] |= {"path": recorded_model[0].partition("@")[0], "revision": commit}
    try:
        return kind.model_validate(values), record
    except ValidationError as error:
        faults = "\n".join(_fault(fault, lines) for fault in error.errors())
        raise ConfigError(f"{source}:\n{faults}") from None


def _model_asked_for(values: Mapping[str, Any]) -> tuple[str, Any] | None:
    model = values.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("path"), str):
        return None
    return model["path"], model.get("revision")


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Returns the file's values, and the line of each field."""
    try:
        text = _read_text(path)
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, _Loader)
        lines: dict[tuple[str, ...], int] = {}
        if node is not None:
            _note_lines(node, (), lines, path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}, not a mapping of sections")
    return values, lines


def _read_text(path: Path) -> str:
    if not str(path).startswith("env:"):
        return path.read_text(encoding="utf-8")
    try:
        return os.environ[str(path).removeprefix("env:")]
    except KeyError:
        raise ConfigError(f"{path}: there is no such variable in the environment") from None


def _note_lines(node: yaml.Node, at: tuple[str, ...], lines: dict[tuple[str, ...], int], path: Path) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        field = (*at, str(key.value))
        line = key.start_mark.line + 1
        if field in lines:  # YAML would silently let the last one win
            name = ".".join(field)
            raise ConfigError(f"{path}: line {line}: {name} stands here and in line {lines[field]}")
        lines[field] = line
        _note_lines(value, field, lines, path)


def _apply(values: dict[str, Any], override: str) -> None:
    """Sets one `section.field=value`; the value is read as YAML, as it would be in the file."""
    _, equals, text = override.partition("=")
    fields = _fields(override)
    if not equals or not all(fields):
        raise ConfigError(f"--set {override}: expected section.field=value")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    for field in fields[:-1]:
        if values.get(field) is None:
            values[field] = {}
        values = values[field]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {field} is not a section")
    values[fields[-1]] = value


def _fields(override: str) -> tuple[str, ...]:
    return tuple(override.partition("=")[0].strip().split("."))


def _redacted(text: str) -> str:
    """A value that is shown as it was given, without what may be a secret in its URLs."""
    return re.sub(r"(?<=[?#])[^\s\"']+", "", without_credentials(text))


def _fault(fault: Mapping[str, Any], lines: Mapping[tuple[str, ...], int]) -> str:
    field = tuple(str(part) for part in fault["loc"])
    inherited = ("defaults", *field[2:]) if field[:1] == ("datasets",) else field
    line = lines.get(field, lines.get(inherited))
    where = f"line {line}: " if line else ""
    name = ".".join(field)
    if not name:  # of several fields; the message names them
        return f"  {fault['msg'].removeprefix('Value error, ')}"
    if fault["type"] == "secret":
        return f"  {where}{name}: {fault['msg']}"
    if fault["type"] == "extra_forbidden":
        return f"  {where}{name}: unknown field"
    if fault["type"] == "missing":
        return f"  {name}: required, but missing"
    message = fault["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(fault["input"], Mapping) else f", not {_redacted(repr(fault['input']))}"
    return f"  {where}{name}: {message}{shown}"
