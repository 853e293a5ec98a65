"""What each stage of the pipeline does alone, with the whole machine: `python -m jobs.alone TASK.json`.

Images/s of reading, of decoding on every core, and of a bare loop over the engine; and, for `benchmark
--decode-only`, decoding against transformers' processor, on one thread.
"""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from cvt.checkpoints import load_checkpoint
from cvt.engine import Engine
from cvt.preprocessing import Preprocessor
from jobs.contenders import ContenderError, WrongCountError, read_images, run_module, task_config
from jobs.peers import Task
from pipeline.chunks import cut_into_chunks
from pipeline.decoding import decode
from pipeline.labelling import NoShardsError
from pipeline.reading import Sample

#: The stages, in the order of the rates that a task's process writes.
STAGES = ("read", "decode", "engine")

_SECONDS = 2.0  # of measuring each stage, at the least
_ENGINE_SECONDS = 10.0  # likewise; it is what the whole job is compared with
_HELD_IMAGES = 256  # encoded, in memory, of each decoding process
_RESIDENT_BATCHES = 4
#: Pixels to which images are enlarged for `--decode-only`.
LARGE = 2_000_000


def measure_alone(task: Task, timeout: float) -> dict[str, float]:
    """Images/s of each of `STAGES`, measured in a process of its own.

    Raises:
        ContenderError: the process failed, or was not done after `timeout` seconds.
    """
    _, failure = run_module(["jobs.alone"], task, timeout)
    if failure is not None:
        raise ContenderError(f"measuring the stages alone: {failure}")
    rates: dict[str, float] = json.loads(_rates_file(task).read_text())
    return rates


def _rates_file(task: Task) -> Path:
    return Path(task.output).with_name("alone.json")


def _measure(task: Task) -> dict[str, float]:
    checkpoint = load_checkpoint(task.model)
    config = task_config(task)
    max_pixels = config.input.max_image_pixels
    count = _RESIDENT_BATCHES * task.batch_size
    images = itertools.islice(itertools.cycle(read_images(task.tars)), count)
    decoded = [decode(data, checkpoint.preprocessor, max_pixels).pixels for data in images]
    pixels = np.stack([image for image in decoded if image is not None])
    engine = Engine(
        checkpoint.model,
        checkpoint.preprocessor,
        device=config.classify.device,
        precision=config.model.precision,
        runtime=config.classify.runtime,
        batch_size=config.classify.batch_size,
        threads=config.classify.threads,
    )
    on_gpu = config.decode.resolved_device(config.classify.device) == "gpu"
    # Resident where the engine gets them: decoded by the GPU, they lie there already.
    resident = torch.from_numpy(pixels).to("cuda") if on_gpu else pixels
    engine(resident)  # what is compiled or tuned at first doesn't count
    # The engine first: nothing of the other stages' processes may be left when it is measured.
    engine_rate = _rate(lambda: len(engine(resident).logits), _ENGINE_SECONDS)
    return {
        "read": _rate(lambda: sum(1 for _ in read_images(task.tars))),
        "decode": (
            _gpu_decode_rate(task, checkpoint.preprocessor, max_pixels)
            if on_gpu
            else _decode_rate(task, checkpoint.preprocessor, max_pixels, config.decode.quality == "fast")
        ),
        "engine": engine_rate,
    }


def _rate(work: Callable[[], int], at_least: float = _SECONDS) -> float:
    """Images/s of work that is done again until it has taken long enough."""
    start = time.perf_counter()
    images = work()
    while (seconds := time.perf_counter() - start) < at_least:
        images += work()
    return images / seconds


def _decode_rate(task: Task, preprocessor: Preprocessor, max_pixels: int, fast: bool) -> float:
    """Images/s of decoding, a process on every core, each with images of its own."""
    context = multiprocessing.get_context("spawn")
    tars = [str(path) for path in sorted(Path(task.tars).iterdir())]
    arguments = [(tars[i :: task.cores] or tars, preprocessor, max_pixels, fast) for i in range(task.cores)]
    barrier = context.Barrier(task.cores)
    with context.Pool(task.cores, _set_barrier, (barrier,)) as pool:
        return sum(pool.map(_decode_share, arguments, chunksize=1))


_barrier: Any = None


def _set_barrier(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _decode_share(arguments: tuple[list[str], Preprocessor, int, bool]) -> float:
    tars, preprocessor, max_pixels, fast = arguments
    images = list(itertools.islice(itertools.chain.from_iterable(map(read_images, tars)), _HELD_IMAGES))
    _barrier.wait()  # nobody has a core to itself while others get ready

    def work() -> int:
        return sum(decode(data, preprocessor, max_pixels, fast).pixels is not None for data in images)

    return _rate(work)


def _gpu_decode_rate(task: Task, preprocessor: Preprocessor, max_pixels: int) -> float:
    """Images/s of decoding on the GPU, one chunk after the other."""
    from pipeline.gpu_decoding import GpuDecoder

    decoder = GpuDecoder(preprocessor, max_pixels, torch.device("cuda"))
    images = itertools.islice(read_images(task.tars), 4 * _HELD_IMAGES)
    samples = (Sample(str(number), data) for number, data in enumerate(images))
    chunks = list(cut_into_chunks(samples, 0, _HELD_IMAGES, 128 * 1024**2))
    decoder(chunks[0])  # what is made at first doesn't count
    return _rate(lambda: sum(decoder(chunk).samples.num_rows for chunk in chunks))


# Decoding against transformers' processor ---------------------------------------------------------


@dataclass(frozen=True)
class Decoding:
    """One way to decode, on one thread.

    Attributes:
        images: which: "as they are", or enlarged.
        count: how many.
        way: what decodes.
        rates: images/s, a round each.
        ratios: of it to transformers' processor, a round each.
    """

    images: str
    count: int
    way: str
    rates: list[float]
    ratios: list[float]


def compare_decoding(
    encoded: list[bytes], preprocessor: Preprocessor, rounds: int, note: Callable[[str], None]
) -> list[Decoding]:
    """From encoded images to the model's input: this package and transformers' processor, in turn.

    Args:
        encoded: images.
        preprocessor: what both do.
        rounds: times that each is measured, after one that doesn't count.
        note: told what is measured now.

    Raises:
        WrongCountError: a way lost an image.
    """
    groups = {
        "as they are": encoded,
        f"enlarged to {LARGE / 1e6:g} megapixels, JPEG quality 90": [enlarged(data) for data in encoded],
    }
    found = []
    for group, images in groups.items():
        ways = _decoders(preprocessor)
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for turn, (way, work) in itertools.product(range(rounds + 1), ways.items()):
            note(f"{way}, images {group}: {f'round {turn} of {rounds}' if turn else 'warm-up'}")
            start = time.perf_counter()
            done = work(images)
            seconds = time.perf_counter() - start
            if done != len(images):
                raise WrongCountError(f"{way}: {done} images came out of {len(images)}")
            if turn:
                rates[way].append(done / seconds)
        theirs = rates[_THEIRS]
        found += [
            Decoding(group, len(images), way, mine, [a / b for a, b in zip(mine, theirs, strict=True)])
            for way, mine in rates.items()
        ]
    return found


_THEIRS = "transformers' processor"


def _decoders(preprocessor: Preprocessor) -> dict[str, Callable[[Iterable[bytes]], int]]:
    """Ways to decode images; each says how many came out."""
    processor = transformers.ConvNextImageProcessorPil(**preprocessor.to_dict())

    def mine(**options: Any) -> Callable[[Iterable[bytes]], int]:
        def run(images: Iterable[bytes]) -> int:
            return sum(decode(data, preprocessor, 10**9, **options).pixels is not None for data in images)

        return run

    def theirs(images: Iterable[bytes]) -> int:
        opened = (Image.open(io.BytesIO(data)).convert("RGB") for data in images)
        return sum(len(processor(image, return_tensors="pt").pixel_values) for image in opened)

    return {"decode": mine(), "decode, fast": mine(fast=True), _THEIRS: theirs}


def enlarged(data: bytes) -> bytes:
    """An image of at least `LARGE` pixels, as JPEG; as it is, if it has that many."""
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    if width * height >= LARGE:
        return data
    factor = next(n for n in itertools.count(2) if width * height * n * n >= LARGE)
    larger = image.convert("RGB").resize((width * factor, height * factor), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    larger.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def take_images(uri: str, preprocessor: Preprocessor, count: int | None) -> list[bytes]:
    """The first images at `uri` that can be decoded; all of them if no count is given.

    Raises:
        StorageError, NoShardsError: they can't be read, or there are none.
    """
    good = (data for data in read_images(uri) if decode(data, preprocessor, 10**9).pixels is not None)
    found = list(itertools.islice(good, count))
    if not found:
        raise NoShardsError(f"{uri}: no image that can be decoded")
    return found


if __name__ == "__main__":
    task = Task.read(sys.argv[1])
    _rates_file(task).write_text(json.dumps(_measure(task)))
