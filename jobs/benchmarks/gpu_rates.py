"""Sections of `cvt-label benchmark gpu` that measure; each job checks that every image came out.

On a CPU, the sections run as far as they need no GPU, so that their code is tested without one.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvt.checkpoints import save_checkpoint
from cvt.inference.engine import PRECISIONS
from jobs.benchmarks.contenders import IN_PROCESS, PIPELINE, Task
from jobs.benchmarks.decoding import decode_on_gpu, to_pixels
from jobs.benchmarks.end_to_end import pack_images
from jobs.benchmarks.gpu_common import (
    BY_IMPORTANCE,
    check,
    checkpoint_of,
    compiler_required,
    decode_options,
    gpu_decoder,
    make_engine,
    measure_classifier,
    random_pixels,
    rate,
    read_tars,
    require_gpu,
    tensorfloat_32,
)
from jobs.benchmarks.model import matrix_rate
from jobs.benchmarks.runs import ContenderResult, run_contender
from jobs.benchmarks.sections import CannotRunError, Report, Row
from jobs.reference import transformers_classifier
from pipeline.decode import decode
from pipeline.decode.gpu import nvjpeg
from pipeline.run import installed_version


def machine(settings: Row, report: Report) -> None:
    """Reports the GPU and its environment."""
    row: Row = {"device": settings["device"], "cpus": settings["cores"]}
    row |= {name: installed_version(name) for name in ("torch", "torchvision", "transformers", "ray")}
    row |= {"cuda": torch.version.cuda, "tf32_in_matmul": torch.get_float32_matmul_precision() != "highest"}
    if settings["device"] == "cuda":
        found = torch.cuda.get_device_properties(0)
        row |= {"gpu": found.name, "memory_gb": round(found.total_memory / 1e9, 1)}
        row |= {"capability": f"{found.major}.{found.minor}", "gpus": torch.cuda.device_count()}
        query = ["nvidia-smi", "--query-gpu=driver_version,pcie.link.gen.max,pcie.link.width.max,power.limit"]
        try:
            done = subprocess.run(
                [*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
            )
            row["driver_pcie_power"] = done.stdout.strip() or done.stderr.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            row["driver_pcie_power"] = str(error)
    report(row)


def measure_limits(settings: Row, report: Report) -> None:
    """Measures matrix products by precision, and copies between host and GPU."""
    device, on_gpu = settings["device"], settings["device"] == "cuda"
    for name in (*PRECISIONS, "tf32"):
        if name != "fp32" and not on_gpu:
            continue  # a CPU may emulate half precision, which takes minutes
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        macs = matrix_rate(device, "fp32" if name == "tf32" else name)
        report({"limit": f"matrix product, {name}", "value": 2 * macs / 1e12, "unit": "TFLOP/s"})
    torch.set_float32_matmul_precision("highest")
    size = 512 * 1024**2 if on_gpu else 64 * 1024**2
    host = torch.ones(size, dtype=torch.uint8)
    for name, source, target in _copies(host, on_gpu):
        gigabytes = rate(lambda s=source, t=target: _copy(s, t, on_gpu), 1.0)  # type: ignore[misc]
        report({"limit": f"copy, {name}", "value": statistics.median(gigabytes) / 1e9, "unit": "GB/s"})


def _copies(host: torch.Tensor, on_gpu: bool) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    yield "host to host", host, torch.empty_like(host)
    if on_gpu:
        pinned, resident = host.pin_memory(), host.to("cuda")
        yield "pinned host to GPU", pinned, resident
        yield "pageable host to GPU", host, resident
        yield "GPU to pinned host", resident, pinned
        yield "GPU to GPU", resident, torch.empty_like(resident)


def _copy(source: torch.Tensor, target: torch.Tensor, on_gpu: bool) -> int:
    target.copy_(source, non_blocking=True)
    if on_gpu:
        torch.cuda.synchronize()
    return source.nbytes


def measure_decoding(settings: Row, report: Report) -> None:
    """Measures both decoders, and both together with the share at which they finish at the same time."""
    images = read_tars(settings["tars"])
    options = decode_options(settings)
    decoded = to_pixels([decode(data, options).pixels for data in images[:64]], options.preprocessor)

    def on_cpu(threads: int) -> list[float]:
        # Every thread has 16 images at least, so that no thread waits for the last ones.
        files = [data for data, _ in zip(cycle(images), range(max(len(images), 16 * threads)), strict=False)]

        def call(pool: ThreadPoolExecutor) -> int:
            count = sum(found.pixels is not None for found in pool.map(lambda x: decode(x, options), files))
            check(count == len(files), f"the CPU decoded {count} of {len(files)} images")
            return count

        with ThreadPoolExecutor(threads) as pool:
            return rate(partial(call, pool))

    def row(decoder: str, rates: list[float], **more: Any) -> None:
        report({"decoder": decoder, "images_per_s": rates, **more})

    row("CPU, 1 thread", on_cpu(1))
    threads = max(1, settings["cores"] - 2)  # reading and converting results need a core each
    cpu_rates = on_cpu(threads)
    row("CPU, all threads", cpu_rates, threads=threads)

    def on_gpu(share: float) -> list[float]:
        decoder = gpu_decoder(settings, threads=threads, cpu_share=share)

        def call() -> int:
            found = len(decode_on_gpu(decoder, images, 1024))
            check(found == len(images), f"the GPU decoder returned {found} of {len(images)} images")
            return found

        rates = rate(call)
        pixels = to_pixels(decode_on_gpu(decoder, images[:64]), options.preprocessor)
        difference = np.abs(pixels.astype(np.int16) - decoded).mean()
        row("GPU decoder", rates, cpu_share=share, threads=threads, mean_difference=float(difference))
        return rates

    gpu_rates = on_gpu(0.0)  # raises `CannotRunError` without a GPU
    torch_only = nvjpeg(torch.device("cuda"))
    plain = [data for data in images if data.startswith(b"\xff\xd8\xff")]
    row("nvJPEG alone, without resizing", rate(lambda: len(torch_only(plain))))
    share = balanced_share(statistics.median(cpu_rates), statistics.median(gpu_rates))
    on_gpu(share)
    row(
        "best decode.cpu_share, with these threads as classify.num_cpus", [], cpu_share=share, threads=threads
    )


def balanced_share(cpu_images_per_s: float, gpu_images_per_s: float) -> float:
    """Returns the share at which both decoders finish at the same time, rounded to 1 %.

    The rates are those of all CPU threads together, and of the GPU alone, in images/s.
    """
    return round(cpu_images_per_s / (cpu_images_per_s + gpu_images_per_s), 2)


def measure_model(settings: Row, report: Report) -> None:
    """Measures engine and transformers, eager, by precision; the engine also on pixels in GPU memory."""
    on_gpu = settings["device"] == "cuda"
    count = 8 * settings["batch_size"] if on_gpu else 32
    pixels = random_pixels(settings, count)
    checkpoint = checkpoint_of(settings["model"], settings["size"])
    for precision in (*BY_IMPORTANCE, "tf32") if on_gpu else ("fp32",):
        dtype = "fp32" if precision == "tf32" else precision
        with tensorfloat_32(precision == "tf32"):
            arguments = checkpoint, settings["device"], dtype, min(settings["batch_size"], count)
            measure_classifier(
                report, "transformers, eager", precision, transformers_classifier(*arguments), pixels
            )
        if precision == "tf32":
            continue  # the engine has no such precision: see the row of transformers for its use
        engine = make_engine(settings, precision)
        measure_classifier(report, "engine, torch", precision, lambda x, e=engine: e(x).logits, pixels)  # type: ignore[misc]
        if on_gpu:
            resident = torch.from_numpy(pixels).to("cuda")
            name = "engine, torch, pixels on the GPU"
            measure_classifier(report, name, precision, lambda x, e=engine: e(x).logits, resident)  # type: ignore[misc]


def measure_pipeline(settings: Row, report: Report, command: str = IN_PROCESS) -> None:
    """Measures whole jobs by decoder and precision; checks that each image has one label."""
    if command == PIPELINE and find_spec("ray") is None:
        raise CannotRunError("ray is not installed")
    on_gpu, count = settings["device"] == "cuda", settings["job_images"]
    checkpoint = checkpoint_of(settings["model"], settings["size"])
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="pipeline-") as folder:
        pack_images(cycle(read_tars(settings["tars"])), Path(folder, "tars"), count, settings["cores"])
        save_checkpoint(checkpoint.to_transformers(), checkpoint.preprocessor, Path(folder, "model"))
        for precision in BY_IMPORTANCE if on_gpu else ("fp32",):
            for decoder in ("gpu", "cpu") if on_gpu else ("cpu",):
                result = ContenderResult(command, count)
                task = Task(
                    tars=f"{folder}/tars",
                    files="",
                    model=f"{folder}/model",
                    size=checkpoint.preprocessor.size,
                    output=f"{folder}/output-{precision}-{decoder}",
                    local=f"{folder}/{precision}-{decoder}",
                    batch_size=settings["batch_size"],
                    device=settings["device"],
                    precision=precision,
                    cores=settings["cores"],
                    overrides=[f"decode.device={decoder}"],
                )
                run_contender(result, task, timeout=300)
                report(
                    {"command": command, "decoder": decoder, "precision": precision, "images": count}
                    | {"images_per_s": result.images_per_s, "seconds": result.seconds}
                    | {"first_labels_s": result.first_labels_s, "failure": result.failure}
                )
                if result.failure and "torchvision" not in result.failure:
                    failures.append(f"{decoder} {precision}: {result.failure}")
    check(not failures, "; ".join(failures))


def measure_compiled(settings: Row, report: Report) -> None:
    """Measures transformers' model with `torch.compile`, by precision."""
    require_gpu(settings)
    pixels = random_pixels(settings, 8 * settings["batch_size"])
    checkpoint = checkpoint_of(settings["model"], settings["size"])
    for precision in BY_IMPORTANCE:
        with tensorfloat_32(False), compiler_required():
            classifier = transformers_classifier(
                checkpoint, settings["device"], precision, settings["batch_size"], compiled=True
            )
            measure_classifier(report, "transformers, compiled", precision, classifier, pixels)
