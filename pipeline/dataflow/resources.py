"""What each stage gets of the CPUs, GPUs and memory there are."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.config import ClassifyConfig, ConfigError, DecodeConfig, ReadConfig

# Multiply-accumulates of a chunk, by what classifies it.
_CHUNK_MACS = {"cpu": 600_000_000_000, "cuda": 4_800_000_000_000}

_CHUNK_PIXEL_BYTES = 160_000_000
_LEAST_CHUNK_IMAGES, _MOST_CHUNK_IMAGES = 16, 4096

# Of a batch, in which CvT-13 at 224 pixels has 64 images; a small model is a sixth faster with 256.
_BATCH_MACS = 300_000_000_000
_LEAST_BATCH, _MOST_BATCH = 64, 256


@dataclass(frozen=True)
class Resources:
    """What each stage gets of the cluster; decided once, and written to the run record.

    The stages' CPUs are fractions that fit together with room to spare, and readers are capped: a
    reader that waits for room downstream keeps its CPU, and must not starve the stage it waits for.
    `decoders` is how many decode tasks find room beside all others, none where classifiers decode;
    memory is in bytes.
    """

    device: str
    chunk_images: int
    chunk_bytes: int
    batch_size: int
    read_cpus: float
    read_memory: int
    readers: int
    decode_cpus: float
    decode_memory: int
    decoders: int
    classify_cpus: float
    classify_gpus: float
    min_actors: int
    max_actors: int
    concurrent_chunks: int
    threads: int | None


@dataclass(frozen=True)
class ClusterCapacity:
    """CPUs and GPUs of a cluster, CPUs of its largest node, and bytes of memory of its smallest."""

    cpus: float
    gpus: float
    node_cpus: float
    node_memory: float = math.inf


@dataclass(frozen=True)
class ResourceRequest:
    """What a job asks for, and what its resources depend on.

    Attributes:
        size: of the model's images, in pixels.
        count_macs: counts the multiply-accumulates of one image; only called if a size is to be chosen.
    """

    read: ReadConfig
    decode: DecodeConfig
    classify: ClassifyConfig
    size: int
    count_macs: Callable[[], int]


def choose_resources(request: ResourceRequest, cluster: ClusterCapacity) -> Resources:
    """Fills in what the configuration leaves to the cluster.

    Raises:
        ConfigError: the actors don't fit into the cluster, and `max_actors` doesn't say that it grows.
    """
    classify, read, decode, size = request.classify, request.read, request.decode, request.size
    readers = read.concurrency or max(1, min(32, int(cluster.cpus // 4) or int(cluster.cpus // 2)))
    on_gpu = classify.device == "cuda" or (
        cluster.gpus > 0 and classify.device == "auto" and classify.runtime != "openvino"  # which is for CPUs
    )
    decodes_apart = decode.device == "cpu"
    decode_cpus = (decode.num_cpus or _decode_cpus(cluster.node_cpus)) if decodes_apart else 0.0
    cpus_left = cluster.cpus - decode_cpus - readers * read.num_cpus
    if on_gpu:
        actor_gpus = classify.num_gpus or 1.0
        actor_cpus = classify.num_cpus or (1.0 if decodes_apart else 2.0)  # what the GPU leaves to it
        room = math.floor(min(cluster.gpus / actor_gpus, cpus_left / actor_cpus))
    else:
        actor_gpus = 0.0
        actor_cpus = classify.num_cpus or _share_of_node(cluster.node_cpus, decode_cpus + read.num_cpus)
        room = math.floor(cpus_left / actor_cpus)
    if classify.max_actors is None and room < classify.min_actors:
        raise ConfigError(
            f"classify.min_actors: {classify.min_actors} classifiers don't fit beside readers and decoders "
            f"into the cluster's {cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs "
            "(a cluster that grows needs classify.max_actors)"
        )
    max_actors = classify.max_actors or room
    threads = classify.threads
    if not on_gpu and threads is None:
        # A classifier that is alone on its machine gets all of it: decoding is a small part.
        threads = int(cluster.node_cpus) if max_actors == 1 else math.ceil(actor_cpus)
    chunk_images = read.chunk_images or _chunk_images(request.count_macs(), size, on_gpu)
    room_for_decoders = cpus_left + decode_cpus - min(max_actors, room) * actor_cpus
    most_memory = cluster.node_memory / 4  # so that a slot of each stage fits into any node
    return Resources(
        device="cuda" if on_gpu else "cpu",
        chunk_images=chunk_images,
        chunk_bytes=read.chunk_bytes,
        batch_size=classify.batch_size
        or _power_of_two(_BATCH_MACS // request.count_macs(), _LEAST_BATCH, _MOST_BATCH),
        read_cpus=read.num_cpus,
        # A chunk as samples, as a table, and as what Ray writes; and what is read ahead.
        read_memory=read.memory
        or int(min(3 * read.chunk_bytes + (read.concurrent_fetches + 1) * 8 * 1024**2, most_memory)),
        readers=readers,
        decode_cpus=decode_cpus,
        # The chunk's pixels as they are made and as Ray writes them, and one large photograph.
        decode_memory=decode.memory or int(min(2 * chunk_images * size**2 * 3 + 256 * 1024**2, most_memory)),
        decoders=max(1, math.floor(room_for_decoders / decode_cpus)) if decodes_apart else 0,
        classify_cpus=actor_cpus,
        classify_gpus=actor_gpus,
        min_actors=classify.min_actors,
        max_actors=max_actors,
        concurrent_chunks=classify.concurrent_chunks,
        threads=threads,
    )


def _decode_cpus(node_cpus: float) -> float:
    """CPUs of a decode task, by those of the largest machine."""
    if node_cpus >= 4:
        return 1.0
    return 0.5 if node_cpus >= 2 else 0.25


def _chunk_images(macs: int, size: int, on_gpu: bool) -> int:
    """Images in a chunk: so many that Ray's own work, some 20 ms a chunk, is little beside the classifier's.

    128 of CvT-13's at 224 pixels on a CPU, which takes seconds for them, and 1024 on a GPU. A chunk of the
    largest models must still be done in a minute, and pixels must not fill the object store.
    """
    work = _CHUNK_MACS["cuda" if on_gpu else "cpu"]
    fitting = min(work // macs, _CHUNK_PIXEL_BYTES // (size**2 * 3))
    return _power_of_two(fitting, _LEAST_CHUNK_IMAGES, _MOST_CHUNK_IMAGES)


def _power_of_two(number: int, least: int, most: int) -> int:
    """The largest power of two up to a number, or the nearest of the bounds, which are such."""
    return max(least, min(most, 1 << number.bit_length() >> 1))


def _share_of_node(node_cpus: float, spare: float) -> float:
    """CPUs of a classifier on a CPU: about half of a machine, at the most eight.

    However many of them a machine holds, `spare` is left, for a reader and a decoder: they must find room
    on any machine, for when the others are lost, the actors of those come to it and never make room again.
    """
    actors = max(1, int(node_cpus // min(8.0, max(0.5, node_cpus // 2))))
    while actors > 1 and (node_cpus - spare) / actors <= spare:  # else one more would fit into the rest
        actors -= 1
    return max(0.25, math.floor((node_cpus - spare) / actors * 100) / 100)
