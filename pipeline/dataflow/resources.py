"""Chooses the CPUs, GPUs and memory of each stage."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cvt.runtimes import OPENVINO_MISSING, RUNTIME_DEVICES, fastest_runtime, openvino_is_installed
from pipeline.config import ClassifyConfig, ConfigError, DecodeConfig, ReadConfig

#: Target multiply-accumulate operations of a chunk, by device.
_CHUNK_MACS = {"cpu": 600_000_000_000, "cuda": 4_800_000_000_000}

_CHUNK_PIXEL_BYTES = 160_000_000
_MIN_CHUNK_IMAGES, _MAX_CHUNK_IMAGES = 16, 4096

#: Target multiply-accumulate operations of a batch: 64 images of CvT-13 at 224 pixels. A small model is a
#: sixth faster with 256 images.
_BATCH_MACS = 300_000_000_000
_MIN_BATCH, _MAX_BATCH = 64, 256


@dataclass(frozen=True)
class Resources:
    """The resources of each stage; chosen once per run, and written to the run record. Memory is in bytes.

    The number of readers is limited, because a reader that waits for a later stage keeps its CPU.

    Attributes:
        chunk_images: maximum number of images in a chunk.
        batch_size: number of images per call of the model.
        readers: number of concurrent read tasks.
        decoders: number of decode tasks that fit next to all other tasks; 0 if classifiers decode.
        initial_actors: number of classifiers that start at once.
        threads: number of CPU threads of a classifier; None for PyTorch's default.
        label_selector: labels of the nodes of the classifiers.
        helpers: the resources of the other pools of classifiers.
    """

    device: str
    runtime: str
    chunk_images: int
    batch_size: int
    read_memory: int
    readers: int
    decode_cpus: float
    decode_memory: int
    decoders: int
    classify_cpus: float
    classify_gpus: float
    min_actors: int
    initial_actors: int
    max_actors: int
    threads: int | None
    label_selector: Mapping[str, str] = field(default_factory=dict)
    helpers: "tuple[Resources, ...]" = ()


@dataclass(frozen=True)
class ClusterCapacity:
    """The capacity of a cluster.

    Attributes:
        cpus, gpus: total number of CPUs and GPUs.
        node_cpus: number of CPUs of the largest node.
        node_memory: bytes of memory of the smallest node.
    """

    cpus: float
    gpus: float
    node_cpus: float
    node_memory: float = math.inf

    @classmethod
    def of(cls, nodes: Iterable[Mapping[str, Any]], *selectors: Mapping[str, str]) -> "ClusterCapacity":
        """Returns the capacity of the nodes, as in `ray.nodes`, that satisfy all selectors."""
        found = (node for node in nodes if all(matches(node["Labels"], each) for each in selectors))
        resources = [node["Resources"] for node in found]
        cpus = [each.get("CPU", 0.0) for each in resources]
        return cls(
            cpus=sum(cpus),
            gpus=sum(each.get("GPU", 0.0) for each in resources),
            node_cpus=max(cpus, default=0.0),
            node_memory=min((each.get("memory", math.inf) for each in resources), default=math.inf),
        )


@dataclass(frozen=True)
class ResourceRequest:
    """The request of a job, and what the choice of resources depends on.

    Attributes:
        size: height and width of the model's images in pixels.
        macs: multiply-accumulate operations for one image.
        labeled_by: the runtime that labeled the partition; None without labels.
    """

    read: ReadConfig
    decode: DecodeConfig
    classify: ClassifyConfig
    size: int
    macs: int
    precision: str = "fp32"
    labeled_by: str | None = None


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Returns whether a node with these labels satisfies a selector of Ray."""
    for name, condition in selector.items():
        values = condition.removeprefix("!").removeprefix("in(").removesuffix(")").replace(" ", "").split(",")
        if (labels.get(name) in values) == condition.startswith("!"):
            return False
    return True


def choose_pools(request: ResourceRequest, nodes: Sequence[Mapping[str, Any]]) -> Resources:
    """Chooses the resources of all pools of classifiers, on nodes as in `ray.nodes`.

    Raises `ConfigError`: the pools before use all GPUs of a pool's nodes, or see `choose_resources`.
    """
    pools, cpus = list[Resources](), ClusterCapacity.of(nodes).cpus
    for number, classify in enumerate(request.classify.each_pool):
        selector, read = classify.label_selector, request.read
        cluster = ClusterCapacity.of(nodes, selector)
        # Ray may place the classifiers of a pool on any of its nodes.
        shared = (ClusterCapacity.of(nodes, selector, pool.label_selector).gpus for pool in pools)
        taken = sum(map(min, shared, (pool.max_actors * pool.classify_gpus for pool in pools)))
        if classify.device == "cuda" and classify.max_actors is None and taken >= cluster.gpus > 0:
            raise ConfigError(
                f"classify.pools.{number}: the pools before use all {cluster.gpus:g} GPUs of its nodes; "
                "select other nodes with gpu or label_selector, or set a lower max_actors in the pools before"
            )
        cluster = replace(cluster, gpus=max(0.0, cluster.gpus - taken))
        on_cpus = not _runs_on_gpu(classify, cluster.gpus)
        if number and on_cpus:
            read = read.model_copy(update={"concurrency": 1})  # one reader is faster than many CPUs
        # Readers and decoders for a GPU run on all nodes.
        cluster = replace(cluster, cpus=min(cpus, cluster.cpus) if on_cpus else cpus)
        pool = choose_resources(replace(request, classify=classify, read=read), cluster)
        if number and on_cpus and classify.max_actors is None:  # half: the decoders of a GPU need many CPUs
            actors = max(classify.min_actors, pool.max_actors // 2)
            pool = replace(pool, initial_actors=actors, max_actors=actors)
        if number:  # a pool keeps its classifiers while it waits for shards
            pool = replace(pool, min_actors=pool.initial_actors)
        cpus -= pool.initial_actors * pool.classify_cpus + pool.readers * read.num_cpus + pool.decode_cpus
        pools.append(pool)
    return replace(pools[0], helpers=tuple(pools[1:]))


def choose_resources(request: ResourceRequest, cluster: ClusterCapacity) -> Resources:
    """Chooses the resources that the configuration does not set.

    Raises:
        ConfigError: the actors do not fit on the cluster, and `max_actors` is not set for a growing cluster;
            the runtime needs a GPU; or the runtime of the partition is not installed.
    """
    classify, read, decode, size = request.classify, request.read, request.decode, request.size
    readers = read.concurrency or max(1, min(32, int(cluster.cpus // 4) or int(cluster.cpus // 2)))
    on_gpu = _runs_on_gpu(classify, cluster.gpus)
    device = "cuda" if on_gpu else "cpu"
    has_decode_tasks = decode.device == "cpu"
    decode_cpus = (decode.num_cpus or max(0.25, min(1.0, cluster.node_cpus / 4))) if has_decode_tasks else 0.0
    cpus_left = cluster.cpus - decode_cpus - readers * read.num_cpus
    if on_gpu:
        actor_gpus = classify.num_gpus or 1.0
        actor_cpus = classify.num_cpus or (1.0 if has_decode_tasks else 2.0)  # also decodes on the CPU
        fitting_actors = math.floor(min(cluster.gpus / actor_gpus, cpus_left / actor_cpus))
    else:
        actor_gpus = 0.0
        actor_cpus = classify.num_cpus or _classifier_cpus(cluster.node_cpus, decode_cpus + read.num_cpus)
        fitting_actors = math.floor(cpus_left / actor_cpus)
    if classify.max_actors is None and fitting_actors < classify.min_actors:
        raise ConfigError(
            f"classify.min_actors: {classify.min_actors} classifiers do not fit on {cluster.cpus:g} free "
            f"CPUs and {cluster.gpus:g} free GPUs next to readers and decoders; if the cluster grows, set "
            "classify.max_actors; with classify.pools, set a lower max_actors in the pools before"
        )
    max_actors = classify.max_actors or fitting_actors
    initial_actors = min(max_actors, max(classify.min_actors, fitting_actors))
    threads = classify.threads
    if not on_gpu and threads is None:
        # A single classifier uses all CPUs of its machine: decoding needs few of them.
        threads = math.ceil(min(cluster.cpus, cluster.node_cpus) if max_actors == 1 else actor_cpus)
    chunk_images = read.chunk_images or _chunk_images(request.macs, size, on_gpu)
    decoder_cpus = cpus_left + decode_cpus - min(max_actors, fitting_actors) * actor_cpus
    max_memory = cluster.node_memory / 4  # so that a task of each stage fits on every node
    return Resources(
        device=device,
        runtime=_choose_runtime(request, device),
        chunk_images=chunk_images,
        batch_size=classify.batch_size or _power_of_two(_BATCH_MACS // request.macs, _MIN_BATCH, _MAX_BATCH),
        # A chunk as samples, as a table and as a block of Ray, and the prefetched ranges.
        read_memory=read.memory
        or int(min(3 * read.chunk_bytes + (read.concurrent_fetches + 1) * 8 * 1024**2, max_memory)),
        readers=readers,
        decode_cpus=decode_cpus,
        # The pixels of a chunk, their copy in a block of Ray, and one large photograph.
        decode_memory=decode.memory or int(min(2 * chunk_images * size**2 * 3 + 256 * 1024**2, max_memory)),
        decoders=max(1, math.floor(decoder_cpus / decode_cpus)) if has_decode_tasks else 0,
        classify_cpus=actor_cpus,
        classify_gpus=actor_gpus,
        min_actors=classify.min_actors,
        initial_actors=initial_actors,
        max_actors=max_actors,
        threads=threads,
        label_selector=classify.label_selector,
    )


def _runs_on_gpu(classify: ClassifyConfig, gpus: float) -> bool:
    """Returns whether classifiers run on GPUs, on nodes with this number of free GPUs."""
    can_choose = classify.device == "auto" and classify.runtime != "openvino"  # OpenVINO is for CPUs
    return classify.device == "cuda" or (can_choose and gpus > 0)


def _choose_runtime(request: ResourceRequest, device: str) -> str:
    """Returns the configured runtime; for "auto", the one that labeled the partition, else the fastest."""
    if (configured := request.classify.runtime) != "auto":
        if RUNTIME_DEVICES.get(configured, device) != device:
            raise ConfigError(
                f"classify.runtime: {configured!r} needs a GPU, and there is none for the classifiers; set "
                "classify.runtime: auto, or classify.device: cuda if GPUs join the cluster later"
            )
        return configured
    runtime = request.labeled_by or fastest_runtime(device, request.precision)
    if RUNTIME_DEVICES.get(runtime, device) != device:
        return "torch"
    if runtime == "openvino" and not openvino_is_installed():
        raise ConfigError(
            f"classify.runtime: openvino made the stored labels, but {OPENVINO_MISSING}; or set "
            "classify.runtime: torch, whose scores differ by rounding"
        )
    return runtime


def _chunk_images(macs: int, size: int, on_gpu: bool) -> int:
    """Returns the number of images in a chunk: for CvT-13 at 224 pixels, 128 on a CPU and 1024 on a GPU.

    Classification takes much longer than Ray's overhead of 20 ms per chunk, but at most a minute with the
    largest models, and the pixels do not fill the object store.
    """
    target = _CHUNK_MACS["cuda" if on_gpu else "cpu"]
    images = min(target // macs, _CHUNK_PIXEL_BYTES // (size**2 * 3))
    return _power_of_two(images, _MIN_CHUNK_IMAGES, _MAX_CHUNK_IMAGES)


def _power_of_two(number: int, minimum: int, maximum: int) -> int:
    """Rounds down to a power of two within bounds, which are powers of two."""
    return max(minimum, min(maximum, 1 << number.bit_length() >> 1))


def _classifier_cpus(node_cpus: float, spare: float) -> float:
    """Returns the CPUs of a classifier on a CPU: about half of a machine, at most eight.

    On each machine, the classifiers leave `spare` CPUs for a reader and a decoder. If the other machines are
    lost, their actors move to this machine and stay, and the reader and the decoder must still fit.
    """
    actors = max(1, int(node_cpus // min(8.0, max(0.5, node_cpus // 2))))
    # Otherwise another actor would fit into the spare CPUs.
    while actors > 1 and (node_cpus - spare) / actors <= spare:
        actors -= 1
    return max(0.25, math.floor((node_cpus - spare) / actors * 100) / 100)
