"""The contenders of the end-to-end benchmark: `python -m jobs.benchmarks.contenders NAME TASK.json`.

Each contender reads the same images from a bucket, and writes Parquet files with `key`, `label` and `score`
to the bucket. The environment has the bucket's endpoint and credentials. The peers use transformers' model
and no code of this package, as in their own documentation and benchmarks. Each function imports its own
libraries, because the start-up time is measured too.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cvt.runtimes import DTYPES, Precision
from pipeline.config import Config, load_job_config

#: All images have this extension, because some readers make one column per extension. Decoders detect the
#: format from the bytes.
EXTENSION = "jpg"
_SMALL_PIXELS = 64


@dataclass(frozen=True)
class Task:
    """The task of a contender. All contenders have the same task for the same number of images.

    Attributes:
        tars: `s3://` URI of a folder with uncompressed tars of images `<key>.jpg`.
        files: the same images as single files, for contenders that cannot read tars.
        model: local folder with a checkpoint in the Hugging Face layout.
        size: height and width of the model's images, in pixels.
        output: `s3://` URI of the folder for the Parquet files; must be empty.
        local: start of the names of local files about this attempt: events, log, configuration.
        batch_size: None: the default of this pipeline, and what is fastest for the peers on a CPU.
        overrides: overrides of the configuration of this pipeline.
    """

    tars: str
    files: str
    model: str
    size: int
    output: str
    local: str
    batch_size: int | None
    device: str
    precision: Precision
    cores: int
    overrides: Sequence[str] = ()

    @property
    def events(self) -> Path:
        """File with one line per labeled batch: the number of images, and `time.monotonic()`."""
        return Path(f"{self.local}.events")

    @property
    def peers_batch_size(self) -> int:
        """The batch size of the peers."""
        return self.batch_size or (256 if self.size < _SMALL_PIXELS else 32)

    def record(self, images: int) -> None:
        """Records that a batch of images is labeled. Any process may call this function."""
        with self.events.open("a") as file:  # a single write keeps lines of several processes apart
            file.write(f"{images} {time.monotonic()}\n")


def config_sections(task: Task) -> dict[str, dict[str, Any]]:
    """Returns the configuration of this pipeline for a task, without the overrides."""
    classify: dict[str, Any] = {"device": task.device, "batch_size": task.batch_size}
    if task.device == "cuda":
        classify["max_actors"] = 1  # one GPU, like the peers
    return {
        "input": {"uri": task.tars, "labels": False},
        "model": {"path": task.model, "precision": task.precision},
        "output": {"uri": task.output},
        "classify": classify,
    }


def task_config(task: Task) -> Config:
    """Returns the configuration of this pipeline for a task.

    Raises:
        ConfigError: an override is not valid.
    """
    sections = config_sections(task).items()
    return load_job_config(
        None, [f"{name}={json.dumps(fields)}" for name, fields in sections] + [*task.overrides]
    )


def engine_alone(task: Task, seconds: float = 10.0) -> None:
    """Calls the pipeline's engine on decoded images in memory for some seconds. Writes no labels.

    As in the pipeline, `classify.concurrent_chunks` calls run at the same time. Each call has the images of a
    chunk or of four batches, whichever is more. The images are in GPU memory if the GPU decodes.
    """
    import torch

    from jobs.reference import load_images
    from pipeline.dataflow import ClusterCapacity, choose_resources
    from pipeline.dataflow.stages import warm_engine
    from pipeline.run import make_job

    job = make_job(task_config(task))
    cluster = ClusterCapacity(cpus=task.cores, gpus=1 if task.device == "cuda" else 0, node_cpus=task.cores)
    resources = choose_resources(job.resource_request, cluster)
    classify = job.config.classify
    engine = warm_engine(job.checkpoint, job.config.model.precision, resources)
    image_count = max(resources.chunk_images, 4 * resources.batch_size)
    images = load_images(task.tars, job.checkpoint.preprocessor, image_count)
    pixels = np.resize(images, (image_count, *images.shape[1:]))  # repeats them
    resident = pixels if resources.decoders else torch.from_numpy(pixels).to("cuda")
    ends: list[float] = []  # times of finished calls; the first call includes tuning and does not count

    def call_repeatedly(_: int) -> None:
        while not ends or time.monotonic() < ends[0] + seconds:
            task.record(len(engine(resident).logits))
            ends.append(time.monotonic())

    with ThreadPoolExecutor(classify.concurrent_chunks) as pool:
        list(pool.map(call_repeatedly, range(classify.concurrent_chunks)))


class TransformersClassifier:
    """Transformers' eager model as a function from pixels to labels and scores."""

    def __init__(self, task: Task, threads: int | None = None) -> None:
        """`threads` is the number of PyTorch threads; None keeps the default of PyTorch."""
        import torch
        from transformers import AutoModelForImageClassification

        if threads is not None:
            torch.set_num_threads(threads)
        self._task = task
        self._dtype = getattr(torch, DTYPES[task.precision])
        model = AutoModelForImageClassification.from_pretrained(task.model)
        self._model = model.to(task.device, self._dtype).eval()
        self._labels = model.config.id2label

    def __call__(self, pixels: Any) -> tuple[list[str], list[float]]:
        """Classifies a batch, a float32 tensor (n, 3, size, size)."""
        import torch

        with torch.inference_mode():
            logits = self._model(pixels.to(self._task.device, self._dtype, non_blocking=True)).logits
            scores, classes = logits.float().softmax(-1).max(-1)
        found = [self._labels[i] for i in classes.tolist()], scores.tolist()
        self._task.record(len(scores))
        return found


def s3_endpoint() -> str | None:
    """Returns the endpoint of the S3 server, as boto3 finds it; None for AWS."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def arrow_s3() -> Any:
    """Returns pyarrow's file system for the S3 server."""
    from pyarrow.fs import S3FileSystem

    scheme, _, host = (s3_endpoint() or "").rpartition("://")
    return S3FileSystem(endpoint_override=host, scheme=scheme) if host else S3FileSystem()


def dataloader(task: Task) -> None:
    """Labels with a DataLoader, as clip-retrieval's clip_inference and timm's inference.py do.

    It reads tars as webdataset does (one streamed GET per tar), decodes, and preprocesses whole batches: in
    workers, one per core, if the model is on a GPU. On a CPU, workers would compete with the model's threads:
    with two cores, one worker is as fast with CvT-13, and less than half as fast with a small model.
    """
    import boto3
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(task.model)
    bucket, prefix = task.tars.removeprefix("s3://").split("/", 1)
    listing = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")
    tars = [each["Key"] for each in listing["Contents"]]

    class Images(IterableDataset[tuple[str, Image.Image]]):
        """Yields keys and images. Each worker reads its part of the tars."""

        def __iter__(self) -> Iterator[tuple[str, Image.Image]]:
            worker, client = get_worker_info(), boto3.client("s3")  # clients cannot be shared or copied
            for tar_key in tars if worker is None else tars[worker.id :: worker.num_workers]:
                body = client.get_object(Bucket=bucket, Key=tar_key)["Body"]
                with tarfile.open(fileobj=body, mode="r|") as tar:
                    for member in tar:
                        file = tar.extractfile(member)
                        assert file is not None
                        image = Image.open(io.BytesIO(file.read())).convert("RGB")
                        yield member.name.partition(".")[0], image

    def preprocess(samples: Sequence[tuple[str, Image.Image]]) -> tuple[list[str], torch.Tensor]:
        keys, images = zip(*samples, strict=True)
        return list(keys), processor(list(images), return_tensors="pt").pixel_values

    classifier = TransformersClassifier(task)
    loader = DataLoader(
        Images(),
        batch_size=task.peers_batch_size,
        num_workers=task.cores if task.device == "cuda" else 0,
        collate_fn=preprocess,
        pin_memory=task.device == "cuda",
    )
    schema = pa.schema({"key": pa.string(), "label": pa.string(), "score": pa.float32()})
    path = task.output.removeprefix("s3://") + "/labels.parquet"
    with pq.ParquetWriter(path, schema, filesystem=arrow_s3()) as writer:
        for keys, pixels in loader:
            labels, scores = classifier(pixels)
            writer.write_table(pa.table([keys, labels, scores], schema=schema))


def ray_data(task: Task) -> None:
    """Labels with Ray Data, as Ray's guide to offline batch inference does.

    Images are decoded in the preprocessing step (`decoder=None`), because the default decoder of
    read_webdataset would send full-size images through the object store.
    """
    import logging

    import ray
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor

    on_gpu, batch_size, filesystem = task.device == "cuda", task.peers_batch_size, arrow_s3()
    processor = AutoImageProcessor.from_pretrained(task.model)

    def preprocess(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in batch[EXTENSION]]
        pixels = processor(images, return_tensors="pt").pixel_values.numpy()
        return {"key": batch["__key__"], "pixels": pixels}

    class Label:
        """The model in an actor."""

        def __init__(self) -> None:
            # Ray limits the threads of an actor to its CPUs. The actor reserves few CPUs to leave room for
            # the readers, but a model on a CPU is faster with all threads.
            self._classifier = TransformersClassifier(task, None if on_gpu else task.cores)

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
            labels, scores = self._classifier(torch.from_numpy(batch["pixels"].copy()))
            return {"key": batch["key"], "label": labels, "score": np.array(scores, np.float32)}

    ray.init(address="local", num_cpus=task.cores, include_dashboard=False, logging_level=logging.ERROR)
    # If both stages had the same CPUs, Ray would fuse them, and they would run one after the other.
    preprocess_cpus = 1.0 if on_gpu else 0.5
    tars, output = (uri.removeprefix("s3://") for uri in (task.tars, task.output))
    images = ray.data.read_webdataset(tars, filesystem=filesystem, decoder=None, num_cpus=preprocess_cpus)
    (
        images.map_batches(preprocess, batch_size=batch_size, num_cpus=preprocess_cpus)
        .map_batches(
            Label,
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=1.0 if on_gpu else max(1.0, task.cores / 2),
            num_gpus=1 if on_gpu else None,
        )
        .write_parquet(output, filesystem=filesystem)
    )


def daft(task: Task) -> None:
    """Labels with Daft, as Daft's own benchmarks (benchmarking/ai/image_classification) do.

    Reads single files, because read_webdataset of Daft 0.7.26 hangs on several tars with two cores.
    """
    import daft as package
    import torch
    from daft import DataType, col
    from daft.io import IOConfig, S3Config
    from PIL import Image
    from transformers import AutoImageProcessor

    package.set_runner_native()
    processor, batch_size = AutoImageProcessor.from_pretrained(task.model), task.peers_batch_size
    endpoint, credentials = s3_endpoint(), S3Config.from_env()
    bucket = IOConfig(s3=credentials.replace(endpoint_url=endpoint) if endpoint else credentials)
    pixels_type = DataType.tensor(DataType.float32(), (3, task.size, task.size))
    result_type = DataType.struct({"label": DataType.string(), "score": DataType.float32()})

    def preprocess(images: Any) -> Any:
        if len(images) == 0:
            return []
        found = [Image.fromarray(np.asarray(image)) for image in images.to_pylist()]
        return [*processor(found, return_tensors="pt").pixel_values.numpy()]

    class Label:
        """The model."""

        def __init__(self) -> None:
            self._classifier = TransformersClassifier(task)

        def classify(self, pixels: Any) -> Any:
            if len(pixels) == 0:
                return []
            labels, scores = self._classifier(torch.from_numpy(np.array(pixels.to_pylist())))
            return [{"label": label, "score": score} for label, score in zip(labels, scores, strict=True)]

        classify = package.method.batch(return_dtype=result_type, batch_size=batch_size)(classify)

    preprocess = package.func.batch(return_dtype=pixels_type, batch_size=batch_size)(preprocess)
    label_class = package.cls(max_concurrency=1, gpus=1 if task.device == "cuda" else 0)(Label)
    images = package.from_glob_path(f"{task.files}/*.{EXTENSION}", io_config=bucket)
    images = images.with_column("image", col("path").download(io_config=bucket).decode_image(mode="RGB"))
    images = images.with_column("pixels", preprocess(col("image")))
    found = images.with_column("found", label_class().classify(col("pixels")))
    label, score = (col("found")[name].alias(name) for name in ("label", "score"))
    found.select(col("path").alias("key"), label, score).write_parquet(task.output, io_config=bucket)


#: This pipeline on Ray and in one process, as its users run it: arguments of `cvt-label label`.
PIPELINE, IN_PROCESS = "cvt-label on Ray", "cvt-label --no-ray"
COMMANDS: dict[str, list[str]] = {PIPELINE: ["--set", "ray.address=local"], IN_PROCESS: ["--no-ray"]}
#: The contender that writes no labels.
ENGINE = "engine alone"
PEERS = {"ray": ray_data, "dataloader": dataloader, "daft": daft}


if __name__ == "__main__":
    name, task_file = sys.argv[1:]
    run = {ENGINE: engine_alone, **PEERS}[name]
    run(Task(**json.loads(Path(task_file).read_text())))
