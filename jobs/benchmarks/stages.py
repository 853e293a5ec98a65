"""What each stage of the pipeline does alone: `python -m jobs.benchmarks.stages TASK.json`, in images/s.

Reading and decoding run in a process on every core; the engine is called as the pipeline calls it.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvt.checkpoints import Checkpoint, load_checkpoint
from cvt.counting import count_macs
from cvt.preprocessing import Preprocessor
from jobs.benchmarks.contenders import Task, task_config
from jobs.benchmarks.figures import BenchmarkError
from jobs.benchmarks.runs import run_module
from jobs.verify import load_images, read_images
from pipeline.config import Config
from pipeline.dataflow import Cluster, ResourceRequest, Resources, choose_resources
from pipeline.dataflow.stages import warm_engine
from pipeline.decode import decode
from pipeline.read import Sample, cut_into_chunks
from pipeline.storage import Storage

_SECONDS = 2.0  # minimum for a stage
_ENGINE_SECONDS = 10.0  # more, because the whole job is compared with the engine
_HELD_IMAGES = 256  # encoded images in memory of each decoding process
_RESIDENT_BATCHES = 4  # minimum


def measure_alone(task: Task, timeout: float) -> dict[str, float]:
    """Returns images/s of each stage, measured in a process of its own.

    Raises:
        BenchmarkError: the process failed.
    """
    task = replace(task, events=f"{task.events}-stages")
    if failure := run_module(["stages"], task, timeout):
        raise BenchmarkError(f"measuring the stages alone: {failure}")
    rates: dict[str, float] = json.loads(Path(task.events).read_text())
    return rates


def measure(task: Task) -> None:
    """Measures the stages in this process, and writes their rates instead of events."""
    checkpoint, config = load_checkpoint(task.model), task_config(task)
    resources = pipeline_resources(task, config, checkpoint)
    # The engine first: processes of the other stages must not run meanwhile.
    engine = engine_rate(task, config, checkpoint, resources)
    tars = [info.uri for info in Storage().list(task.tars)]
    preprocessor, max_pixels = checkpoint.preprocessor, config.input.max_image_pixels
    rates = {"read": on_every_core(task.cores, _read_share, tars)}
    if resources.decoders:
        options = preprocessor, max_pixels, config.decode.quality == "fast"
        rates["decode"] = on_every_core(task.cores, _decode_share, tars, *options)
    else:
        rates["decode"] = _gpu_decode_rate(task, preprocessor, max_pixels)
    Path(task.events).write_text(json.dumps(rates | {"engine": engine}))


def pipeline_resources(task: Task, config: Config, checkpoint: Checkpoint) -> Resources:
    """Returns the resources that the pipeline gives to its stages on this machine."""
    size = checkpoint.preprocessor.size
    cluster = Cluster(cpus=task.cores, gpus=1 if task.device == "cuda" else 0, node_cpus=task.cores)
    count = partial(count_macs, checkpoint.model.config, size, size)
    return choose_resources(
        ResourceRequest(config.read, config.decode, config.classify, size, count), cluster
    )


def engine_rate(task: Task, config: Config, checkpoint: Checkpoint, resources: Resources) -> float:
    """Returns images/s of the pipeline's engine on chunks that are decoded already."""
    engine = warm_engine(checkpoint, config.model.precision, config.classify.runtime, resources)
    pixels = resident_images(task.tars, checkpoint.preprocessor, resources)
    # The images are where the engine gets them: on the GPU if the GPU decodes.
    resident = pixels if resources.decoders else torch.from_numpy(pixels).to("cuda")
    return rate_of_calls(lambda: len(engine(resident).logits), config.classify.chunks_at_once)


def resident_images(tars: str, preprocessor: Preprocessor, resources: Resources) -> np.ndarray:
    """Returns a chunk of decoded images, or four batches if they are more; repeats images if needed."""
    count = max(resources.chunk_images, _RESIDENT_BATCHES * resources.batch_size)
    return np.resize(images := load_images(tars, preprocessor, count), (count, *images.shape[1:]))


def rate_of_calls(call: Callable[[], int], at_once: int, seconds: float = _ENGINE_SECONDS) -> float:
    """Returns images/s of calls of which `at_once` run at any time.

    The time is from the end of the first call, whose tuning does not count, to the end of the last.
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


def on_every_core(cores: int, share: Callable[..., float], tars: list[str], *options: Any) -> float:
    """Returns the sum of the rates of `share(barrier, tars, *options)` in a process on every core.

    Each process gets its own tars, or all if there are too few. The barrier opens when all are ready, so
    that none has the machine to itself while others start.
    """
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(cores) as pool:
        barrier = manager.Barrier(cores)
        shares = [(barrier, tars[i::cores] or tars, *options) for i in range(cores)]
        return sum(pool.starmap(share, shares, chunksize=1))


def _rate(work: Callable[[], int]) -> float:
    """Returns images/s of work that is repeated until it has taken long enough."""
    start, images = time.perf_counter(), work()
    while (seconds := time.perf_counter() - start) < _SECONDS:
        images += work()
    return images / seconds


def _read_share(barrier: Any, tars: list[str]) -> float:
    turns = itertools.cycle(tars)
    next(read_images(tars[0]))  # makes the client
    barrier.wait()
    return _rate(lambda: sum(1 for _ in read_images(next(turns))))


def _decode_share(barrier: Any, tars: list[str], preprocessor: Preprocessor, *options: Any) -> float:
    images = list(itertools.islice(itertools.chain.from_iterable(map(read_images, tars)), _HELD_IMAGES))
    barrier.wait()
    return _rate(lambda: sum(decode(data, preprocessor, *options).pixels is not None for data in images))


def _gpu_decode_rate(task: Task, preprocessor: Preprocessor, max_pixels: int) -> float:
    """Returns images/s of decoding on the GPU, one chunk after the other."""
    from pipeline.decode.gpu import GpuDecoder

    decoder = GpuDecoder(preprocessor, max_pixels, torch.device("cuda"))
    images = itertools.islice(read_images(task.tars), 4 * _HELD_IMAGES)
    samples = (Sample(str(number), data) for number, data in enumerate(images))
    chunks = list(cut_into_chunks(samples, 0, _HELD_IMAGES, 128 * 1024**2))
    decoder(chunks[0])  # warm-up
    return _rate(lambda: sum(decoder(chunk).samples.num_rows for chunk in chunks))


if __name__ == "__main__":
    measure(Task.read(sys.argv[1]))
