"""The configuration of the stages (read, decode, classify) and of the Ray cluster that runs them."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cvt.runtimes import Device, Runtime
from pipeline.config.base import Address, PositiveFloat, PositiveInt, Section

#: The value of `ray.address` that runs the job in threads of its own process, without Ray.
IN_PROCESS = "in-process"

#: The error message if a GPU is configured to decode and torchvision is missing.
NO_TORCHVISION = (
    "install the torchvision that fits this PyTorch (pip install 'cvt-label[gpu]'), or set decode.device: cpu"
)


class ReadConfig(Section):
    """Read tasks, and the size of the chunks that they produce."""

    concurrency: PositiveInt | None = None
    """Number of concurrent read tasks. Null: a quarter of the cluster's CPUs, at least 1 and at most 32."""
    num_cpus: PositiveFloat = 0.25
    """CPUs that Ray reserves for each read task."""
    concurrent_fetches: PositiveInt = 4
    """Number of 8 MiB ranges of a tar that a read task fetches at once, to hide the latency of storage."""
    concurrent_downloads: PositiveInt = 64
    """Table: maximum number of concurrent `http://` and `https://` requests of a read task."""
    downloads_per_host: PositiveInt = 16
    """Table: maximum number of these requests to one host. A slow host delays no other host."""
    split_bytes: PositiveInt | None = 4 * 1024**3
    """Size in bytes from which a Parquet file or an uncompressed tar is divided into parts of about this
    size. A part is a shard: it is read, written and resumed on its own. After a change of this field, divided
    files are labeled again. A tar of more than 10,000 parts is an error. Null: no file is divided.
    """
    chunk_images: PositiveInt | None = None
    """Maximum number of images in a chunk. Null: from the model's size; for CvT-13 at 224 pixels, 1024 on a
    GPU and 128 on a CPU.
    """
    chunk_bytes: PositiveInt = 128 * 1024**2
    """Maximum size of a chunk's encoded images, keys and messages, in bytes."""
    max_page_bytes: PositiveInt = 2 * 1024**3
    """Parquet: maximum memory for one page of a column, in bytes. A shard with a larger page cannot be read.
    Many writers put up to 1,024 images into a page. The default allows every page that Arrow reads. For
    untrusted files, set a lower limit.
    """
    max_shard_samples: PositiveInt = 1_000_000
    """Maximum number of samples of a shard. A shard with more samples cannot be read. The driver holds the
    results of a shard until the shard is complete: up to 1 KB per sample, and its key, error and embedding.
    """
    timeout_s: PositiveFloat = 600
    """Maximum seconds for reading one sample. A shard with a sample that takes longer cannot be read in this
    run. The next run tries the shard again.
    """
    memory: PositiveInt | None = None
    """Memory of each read task in Ray, in bytes. Null: from `chunk_bytes` and `concurrent_fetches`."""


class DecodeConfig(Section):
    """How images are decoded, and the resources of the decode tasks."""

    device: Literal["cpu", "gpu", "auto"] = "cpu"
    """Where images are decoded. `gpu`: the classifier decodes JPEG by nvJPEG on its GPU, and needs
    torchvision. `auto`: `gpu` if `classify.device` is `cuda`, else `cpu`. Labels depend on this field.
    """
    quality: Literal["exact", "fast"] = "exact"
    """`exact`: as transformers' processor. `fast`: a JPEG of at least twice the needed size is decoded at
    1/2, 1/4 or 1/8 of its size, on the CPU only. Labels depend on this field.
    """
    cpu_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """`device: gpu`: fraction of the JPEGs that CPU threads of the classifier (`classify.num_cpus`) decode
    while nvJPEG decodes the others. `cvt-label benchmark gpu` measures the best value. Labels depend on this
    field.
    """
    num_cpus: PositiveFloat | None = None
    """CPUs that Ray reserves for each decode task. Null: 1, or less on nodes with fewer than 4 CPUs."""
    memory: PositiveInt | None = None
    """Memory of each decode task in Ray, in bytes. Null: from the chunk size and the model's image size."""
    timeout_s: PositiveFloat = 60
    """Maximum CPU time for decoding an image, in seconds. An image that takes longer is an error row.
    Decoding a chunk takes at most ten times as long: an image then has less time.
    """


#: Labels of the Ray nodes to use: a value, `!value`, `in(a, b)` or `!in(a, b)` by name.
LabelSelector = dict[str, Annotated[str, Field(pattern=r"^!?(in\([\w.-]+(, ?[\w.-]+)*\)|[\w.-]+)$")]]


#: A field of a pool.
_OF_SECTION: Any = Field(default=None, description="Null: the value of the same field of `classify`.")


class PoolConfig(Section):
    """A pool of classifiers."""

    gpu: str | None = Field(default=None, examples=["L4"])
    """Type of the GPUs, in Ray's node label `ray.io/accelerator-type`; sets `device` to `cuda`. Null: any."""
    device: Device | None = _OF_SECTION
    runtime: Literal["auto", Runtime] | None = _OF_SECTION
    num_gpus: PositiveFloat | None = _OF_SECTION
    num_cpus: PositiveFloat | None = _OF_SECTION
    min_actors: PositiveInt | None = _OF_SECTION
    max_actors: PositiveInt | None = _OF_SECTION
    batch_size: PositiveInt | None = _OF_SECTION
    threads: PositiveInt | None = _OF_SECTION
    label_selector: LabelSelector | None = _OF_SECTION


class ClassifyConfig(Section):
    """Classifier actors. Null values are chosen from the resources of the cluster."""

    device: Device = "auto"
    """Device of the model. `auto`: `cuda` if the cluster has a GPU, else `cpu`."""
    runtime: Literal["auto", Runtime] = "auto"
    """What runs the model: PyTorch (`torch`), compiled PyTorch on GPUs (`compile`), or OpenVINO on CPUs
    (`openvino`, needs `cvt-label[openvino]` on all nodes). `auto`: the runtime of the stored labels; without
    labels, `openvino` on CPUs if it is installed, else `torch`.
    """
    num_gpus: PositiveFloat | None = None
    """GPUs of each actor. Null: 1 on a GPU, 0 on a CPU."""
    num_cpus: PositiveFloat | None = None
    """CPUs of each actor. Null: on a GPU 1, or 2 if it decodes; on a CPU about half of a node, at most 8."""
    min_actors: PositiveInt = 1
    """Minimum number of actors."""
    max_actors: PositiveInt | None = None
    """Maximum number of actors. Null: as many as fit into the cluster when the job starts. Set this field if
    the cluster scales up during the job. A job starts with as many actors as fit into the cluster.
    """
    batch_size: PositiveInt | None = None
    """Images in a batch of the model. Null: from the model's size, 64 to 256; 64 for CvT-13 at 224 pixels."""
    concurrent_chunks: PositiveInt = 2
    """Chunks in an actor at once. One is classified while others are decoded or converted to rows."""
    threads: PositiveInt | None = None
    """CPU threads of the model on a CPU. Null: the actor's CPUs, or all of the node if there is one actor."""
    timeout_s: PositiveFloat = 600
    """Maximum time for classifying a chunk, in seconds. An actor that takes longer ends, and its chunk is
    retried, up to `ray.task_retries` times. Without Ray, the run ends with an error.
    """
    label_selector: LabelSelector = Field(default={}, examples=[{"market-type": "!spot"}])
    """Labels of the nodes of the actors, in addition to `ray.label_selector`."""
    pools: list[PoolConfig] = Field(default=[], examples=[[{"gpu": "L4"}, {"device": "cpu"}]])
    """Pools of different actors, the fastest one first. The fields of a pool replace those of this section.
    Empty: one pool. Not used in process.
    """

    @property
    def each_pool(self) -> list["ClassifyConfig"]:
        """The section of each pool."""
        sections = []
        for pool in self.pools or [PoolConfig()]:
            update = pool.model_dump(exclude_none=True, exclude={"gpu"})
            if pool.gpu is not None:
                labels = update.get("label_selector", self.label_selector)
                labels = {"ray.io/accelerator-type": pool.gpu} | labels
                update |= {"device": "cuda", "label_selector": labels}
            sections.append(self.model_copy(update=update | {"pools": []}))
        return sections

    @model_validator(mode="after")
    def _check_actor_limits(self) -> Self:
        for pool in self.each_pool:
            if pool.max_actors is not None and pool.max_actors < pool.min_actors:
                raise ValueError(f"max_actors {pool.max_actors} is below min_actors {pool.min_actors}")
        return self


class RayConfig(Section):
    """The Ray cluster that runs the job, and the limits of Ray Data."""

    address: Address | None = Field(default=None, examples=["10.0.0.1:6379"])
    """Address of the cluster: `host:port`, `ray://host:port`, `auto`, or `local` to start Ray on this
    machine. `in-process`: run all stages in threads of this process, without Ray. Null: the cluster in
    `RAY_ADDRESS`, which Ray sets for submitted jobs; else this process if at most 64 MiB are to be labeled
    (and at most 10,000 images if their number is known) and the last run ended cleanly; else a local Ray.
    """
    label_selector: LabelSelector = Field(default={}, examples=[{"ray-subcluster": "labeling"}])
    """Labels of the nodes that run the stages, by name: `value`, `!value`, `in(a, b)` or `!in(a, b)`. Nodes
    get labels from `ray start --labels`, and some from Ray, such as `ray.io/accelerator-type`. Empty: all
    nodes.
    """
    no_progress_timeout_s: PositiveFloat = 900
    """Seconds without any finished task after which the run ends with an error. At least `ray.task_retries` +
    1 times the sum of `classify.timeout_s` and ten times `decode.timeout_s`, the maximum time of all attempts
    at a chunk: 4800 with the defaults.
    """
    task_retries: Annotated[int, Field(ge=0)] = 3
    """Number of retries of the work on one chunk or shard after its worker or node has died. The shard is
    then an error, and the run goes on.
    """
    actor_start_retries: Annotated[int, Field(ge=0)] = 3
    """Number of consecutive actors that may die while they start."""

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str | None) -> str | None:
        if address is None or ":" in address or address in ("auto", "local", IN_PROCESS):
            return address
        raise ValueError(f"expected host:port, ray://host:port, auto, local or {IN_PROCESS}")
