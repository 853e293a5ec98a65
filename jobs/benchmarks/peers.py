"""What the benchmark measures the pipeline against: `python -m jobs.peers NAME TASK.json`.

Each peer labels a folder of tars with transformers' model, written as its own documentation and benchmarks
do it, with nothing of this package. Images in, Parquet files with `key`, `label` and `score` out.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cvt.runtimes import DTYPES, Precision


@dataclass(frozen=True)
class Task:
    """What a contender is to do; every one of a round gets the same.

    Attributes:
        tars: folder with the input: uncompressed tars of images `<key>.<extension>`; the pipeline's may be
            in S3.
        files: folder with the same images, `<key>.<extension>`, for who can't read tars; it may be empty.
        extension: of every image, without the dot.
        model: folder with a checkpoint in Hugging Face's layout.
        size: of the model's images, in pixels.
        output: folder for the Parquet files; there is none yet. The pipeline's may be in S3.
        events: file to which a line is added whenever images are labelled: how many, and `time.monotonic()`.
            What else a contender leaves lies beside it.
        batch_size: images in a batch.
        device: "cpu" or "cuda".
        precision: as `cvt.runtimes` has it.
        cores: CPUs of this machine.
        overrides: of the pipeline's configuration; peers have none.
    """

    tars: str
    files: str
    extension: str
    model: str
    size: int
    output: str
    events: str
    batch_size: int
    device: str
    precision: Precision
    cores: int
    overrides: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: str) -> Task:
        """From a JSON file."""
        values = json.loads(Path(path).read_text())
        return cls(**values | {"overrides": tuple(values["overrides"])})

    def labelled(self, images: int) -> None:
        """Notes that so many more images are labelled; from any process."""
        line = f"{images} {time.monotonic()}\n".encode()
        file = os.open(self.events, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line)  # one write to the end of a file is not torn
        os.close(file)


class Classifier:
    """Transformers' model, eager: pixels to labels and scores."""

    def __init__(self, task: Task, threads: int | None = None) -> None:
        """Loads it; `threads` of PyTorch, its own choice if None."""
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
        self._task.labelled(len(scores))
        return found


def dataloader(task: Task) -> None:
    """A DataLoader whose workers read, decode and preprocess; one process that runs the model.

    As in clip-retrieval's clip_inference and timm's inference.py: a worker a core, two batches ahead of
    each, pinned memory on a GPU. Its tars are read by tarfile, not webdataset, which is one package less.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info
    from transformers import AutoImageProcessor

    class Images(IterableDataset[Any]):
        """Keys and pixels; each worker has its share of the tars."""

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            processor = AutoImageProcessor.from_pretrained(task.model)
            worker = get_worker_info()
            assert worker is not None
            for path in sorted(Path(task.tars).glob("*.tar"))[worker.id :: worker.num_workers]:
                with tarfile.open(path) as tar:
                    for member in tar:
                        data = tar.extractfile(member)
                        assert data is not None
                        image = Image.open(data).convert("RGB")
                        pixels = processor(image, return_tensors="pt").pixel_values[0]
                        yield member.name.partition(".")[0], pixels

    classifier = Classifier(task)
    loader = DataLoader(
        Images(),
        batch_size=task.batch_size,
        num_workers=task.cores,
        prefetch_factor=2,
        pin_memory=task.device == "cuda",
    )
    schema = pa.schema({"key": pa.string(), "label": pa.string(), "score": pa.float32()})
    Path(task.output).mkdir()
    with pq.ParquetWriter(f"{task.output}/labels.parquet", schema) as writer:
        for keys, pixels in loader:
            labels, scores = classifier(pixels)
            writer.write_table(pa.table([list(keys), labels, scores], schema=schema))


def ray_data(task: Task) -> None:
    """Ray Data: read_webdataset, map_batches to preprocess, map_batches with an actor, write_parquet.

    As in its guide to offline batch inference and its example of image classification with a vision
    transformer. Images are decoded where they are preprocessed (`decoder=None`): the default decoder of
    read_webdataset would send whole pictures through the object store.
    """
    import logging

    import ray
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor

    on_gpu = task.device == "cuda"

    processor = AutoImageProcessor.from_pretrained(task.model)

    def preprocess(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in batch[task.extension]]
        pixels = processor(images, return_tensors="pt").pixel_values.numpy()
        return {"key": batch["__key__"], "pixels": pixels}

    class Label:
        """The model, in an actor."""

        def __init__(self) -> None:
            # Ray gives an actor the threads of its CPUs; here they are few, so that it fits beside the
            # readers, but a CPU model is faster with all of them.
            self._classifier = Classifier(task, None if on_gpu else task.cores)

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
            labels, scores = self._classifier(torch.from_numpy(batch["pixels"].copy()))
            return {"key": batch["key"], "label": labels, "score": np.array(scores, np.float32)}

    ray.init(address="local", num_cpus=task.cores, include_dashboard=False, logging_level=logging.ERROR)
    # On a CPU both stages would take turns in the actor, fused, if they asked for the same CPUs.
    preprocess_cpus = 1.0 if on_gpu else 0.5
    model_cpus = 1.0 if on_gpu else max(1.0, task.cores / 2)
    images = ray.data.read_webdataset(task.tars, decoder=None, num_cpus=preprocess_cpus)
    (
        images.map_batches(preprocess, batch_size=task.batch_size, num_cpus=preprocess_cpus)
        .map_batches(
            Label,
            batch_size=task.batch_size,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=model_cpus,
            num_gpus=1 if on_gpu else None,
        )
        .write_parquet(task.output)
    )


def daft(task: Task) -> None:
    """Daft: a glob of image files, download, decode, a function to preprocess, a class for the model.

    As in the image classification of Daft's own benchmarks (benchmarking/ai/image_classification), on its
    native runner. Not from the tars: its read_webdataset (of 0.7.26) hangs on several tars where there are
    two cores. So it finds the images in files of their own, unpacked before it starts.
    """
    import daft as package
    import torch
    from daft import DataType, col
    from PIL import Image
    from transformers import AutoImageProcessor

    package.set_runner_native()
    processor = AutoImageProcessor.from_pretrained(task.model)
    pixels_type = DataType.tensor(DataType.float32(), (3, task.size, task.size))
    result_type = DataType.struct({"label": DataType.string(), "score": DataType.float32()})

    @package.func(return_dtype=pixels_type)
    def preprocess(image: Any) -> Any:
        return processor(Image.fromarray(np.asarray(image)), return_tensors="pt").pixel_values[0].numpy()

    @package.cls(max_concurrency=1, gpus=1 if task.device == "cuda" else 0)
    class Label:
        """The model."""

        def __init__(self) -> None:
            self._classifier = Classifier(task)

        @package.method.batch(return_dtype=result_type, batch_size=task.batch_size)
        def classify(self, pixels: Any) -> Any:
            if len(pixels) == 0:
                return []
            labels, scores = self._classifier(torch.from_numpy(np.array(pixels.to_pylist())))
            return [{"label": label, "score": score} for label, score in zip(labels, scores, strict=True)]

    images = package.from_glob_path(f"{task.files}/*.{task.extension}")
    images = images.with_column("image", col("path").download().decode_image(mode="RGB"))
    images = images.with_column("pixels", preprocess(col("image")))
    found = images.with_column("found", Label().classify(col("pixels")))
    found.select(
        col("path").alias("key"),
        col("found")["label"].alias("label"),
        col("found")["score"].alias("score"),
    ).write_parquet(task.output)


class Peer(NamedTuple):
    """What the pipeline is measured against.

    Attributes:
        run: does a task.
        title: what a person calls it.
        package: that it needs.
    """

    run: Callable[[Task], None]
    title: str
    package: str


#: By the names that `--peers` takes.
PEERS = {
    "ray": Peer(ray_data, "Ray Data, transformers", "ray"),
    "dataloader": Peer(dataloader, "DataLoader, transformers", "torch"),
    "daft": Peer(daft, "Daft, transformers", "daft"),
}


if __name__ == "__main__":
    PEERS[sys.argv[1]].run(Task.read(sys.argv[2]))
