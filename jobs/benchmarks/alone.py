"""What each stage of the pipeline does alone, with the whole machine: `python -m jobs.alone TASK.json`.

Images/s of reading and of decoding, a process on every core, and of the engine, called as the pipeline does.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvt.checkpoints import Checkpoint, load_checkpoint
from cvt.counting import count_macs
from cvt.preprocessing import Preprocessor
from jobs.benchmarks.contenders import ContenderError, run_module
from jobs.benchmarks.data import read_images
from jobs.benchmarks.own_contender import task_config
from jobs.benchmarks.peers import Task
from pipeline.config import Config
from pipeline.dataflow import Cluster, ResourceRequest, Resources, choose_resources
from pipeline.dataflow.stages import warm_engine
from pipeline.decode import decode
from pipeline.read import Sample, cut_into_chunks
from pipeline.storage import Storage

#: The stages, in the order of the rates that a task's process writes.
STAGES = ("read", "decode", "engine")


_SECONDS = 2.0  # of measuring each stage, at the least

_ENGINE_SECONDS = 10.0  # likewise; it is what the whole job is compared with

_HELD_IMAGES = 256  # encoded, in memory, of each decoding process

_RESIDENT_BATCHES = 4  # at the least


def measure_alone(task: Task, timeout: float) -> dict[str, float]:
    """Images/s of each of `STAGES`, measured in a process of its own.

    Raises:
        ContenderError: the process failed, or was not done after `timeout` seconds.
    """
    _, failure = run_module(["jobs.benchmarks.alone"], task, timeout)
    if failure is not None:
        raise ContenderError(f"measuring the stages alone: {failure}")
    rates: dict[str, float] = json.loads(_rates_file(task).read_text())
    return rates


def _rates_file(task: Task) -> Path:
    return Path(task.events).with_name("alone.json")


def _measure(task: Task) -> dict[str, float]:
    checkpoint, config = load_checkpoint(task.model), task_config(task)
    resources = pipeline_resources(task, config, checkpoint)
    # The engine first: nothing of the other stages' processes may be left when it is measured.
    engine_rate = _engine_rate(task, config, checkpoint, resources)
    tars = [info.uri for info in Storage().list(task.tars)]
    preprocessor, max_pixels = checkpoint.preprocessor, config.input.max_image_pixels
    fast = config.decode.quality == "fast"
    with processes(task.cores) as rate:
        return {
            "read": rate(_read_share, tars),
            "decode": (
                rate(_decode_share, tars, preprocessor, max_pixels, fast)
                if resources.decoders
                else _gpu_decode_rate(task, preprocessor, max_pixels)
            ),
            "engine": engine_rate,
        }


def _rate(work: Callable[[], int]) -> float:
    """Images/s of work that is done again until it has taken long enough."""
    start = time.perf_counter()
    images = work()
    while (seconds := time.perf_counter() - start) < _SECONDS:
        images += work()
    return images / seconds


# The engine -------------------------------------------------------------------------------------


def _engine_rate(task: Task, config: Config, checkpoint: Checkpoint, resources: Resources) -> float:
    """Images/s of the engine that the pipeline would make, on images that are decoded already."""
    engine = warm_engine(checkpoint, config.model.precision, config.classify.runtime, resources)
    count = max(resources.chunk_images, _RESIDENT_BATCHES * resources.batch_size)
    encoded = itertools.islice(itertools.cycle(read_images(task.tars)), count)
    decoded = [
        decode(data, checkpoint.preprocessor, config.input.max_image_pixels).pixels for data in encoded
    ]
    pixels = np.stack([image for image in decoded if image is not None])
    # Resident where the engine gets them: decoded by the GPU, they lie there already.
    resident = pixels if resources.decoders else torch.from_numpy(pixels).to("cuda")
    return rate_of_calls(lambda: len(engine(resident).logits), config.classify.chunks_at_once)


def pipeline_resources(task: Task, config: Config, checkpoint: Checkpoint) -> Resources:
    """What the pipeline gives to its stages on this machine."""
    size = checkpoint.preprocessor.size
    cluster = Cluster(cpus=task.cores, gpus=1 if task.device == "cuda" else 0, node_cpus=task.cores)
    count = functools.partial(count_macs, checkpoint.model.config, size, size)
    request = ResourceRequest(config.read, config.decode, config.classify, size, count)
    return choose_resources(request, cluster)


def rate_of_calls(call: Callable[[], int], at_once: int, seconds: float = _ENGINE_SECONDS) -> float:
    """Images/s of calls of which as many as `at_once` are always under way.

    From the end of the first one, whose tuning doesn't count, to that of the last; in between, none waits for
    another to end before it begins.
    """
    ends: list[tuple[float, int]] = []

    def calls(_: int) -> None:
        while not ends or time.perf_counter() < ends[0][0] + seconds:
            images = call()
            ends.append((time.perf_counter(), images))

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(calls, range(at_once)))
    (first, _), *others = ends
    return sum(images for _, images in others) / (others[-1][0] - first)


# Reading and decoding ---------------------------------------------------------------------------


@contextmanager
def processes(cores: int) -> Iterator[Callable[..., float]]:
    """A process on every core, as `rate(share, tars, ...)`, which adds up the rates of their shares."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(cores, _set_barrier, (context.Barrier(cores),)) as pool:

        def rate(share: Callable[..., float], tars: list[str], *options: Any) -> float:
            return sum(pool.starmap(share, [(each, *options) for each in spread(tars, cores)], chunksize=1))

        yield rate


def spread(tars: list[str], processes: int) -> list[list[str]]:
    """Tars for each process: its own, or all where there are too few."""
    return [tars[i::processes] or tars for i in range(processes)]


_barrier: Any = None


def _set_barrier(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _read_share(tars: list[str]) -> float:
    turns = itertools.cycle(tars)
    next(read_images(tars[0]))  # makes the client
    _barrier.wait()  # nobody has a core to itself while others get ready
    return _rate(lambda: sum(1 for _ in read_images(next(turns))))


def _decode_share(tars: list[str], preprocessor: Preprocessor, max_pixels: int, fast: bool) -> float:
    images = list(itertools.islice(itertools.chain.from_iterable(map(read_images, tars)), _HELD_IMAGES))
    _barrier.wait()

    def work() -> int:
        return sum(decode(data, preprocessor, max_pixels, fast).pixels is not None for data in images)

    return _rate(work)


def _gpu_decode_rate(task: Task, preprocessor: Preprocessor, max_pixels: int) -> float:
    """Images/s of decoding on the GPU, one chunk after the other."""
    from pipeline.decode.gpu import GpuDecoder

    decoder = GpuDecoder(preprocessor, max_pixels, torch.device("cuda"))
    images = itertools.islice(read_images(task.tars), 4 * _HELD_IMAGES)
    samples = (Sample(str(number), data) for number, data in enumerate(images))
    chunks = list(cut_into_chunks(samples, 0, _HELD_IMAGES, 128 * 1024**2))
    decoder(chunks[0])  # what is made at first doesn't count
    return _rate(lambda: sum(decoder(chunk).samples.num_rows for chunk in chunks))


if __name__ == "__main__":
    task = Task.read(sys.argv[1])
    _rates_file(task).write_text(json.dumps(_measure(task)))
