"""Models and images for `verify` and the benchmarks, and transformers' model as the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict

import numpy as np
import torch
import transformers
from transformers.activations import QuickGELUActivation

from cvt.architecture import PRESETS, transformers_problem
from cvt.checkpoints import Checkpoint
from cvt.errors import CheckpointError
from cvt.inference.engine import PRECISIONS
from cvt.modeling import CvtForImageClassification, preset_config
from cvt.network import CvtClassifier
from cvt.preprocessing import Preprocessor
from pipeline.classify.checkpoint import open_checkpoint
from pipeline.config import ConfigError, InputConfig
from pipeline.decode import DecodeOptions, decode
from pipeline.read import NoShardsError, ReadOptions, list_input_shards, read_samples
from pipeline.storage import Storage

#: Limit on the pixels of an image, so high that no image exceeds it.
MAX_PIXELS = 10**9


def load_model(model: str, size: int | None) -> Checkpoint:
    """Loads a checkpoint, or creates a published variant with random weights for images of `size` pixels."""
    if model in PRESETS:
        torch.manual_seed(0)
        labels = tuple(f"class {i}" for i in range(1000))
        network = CvtClassifier.copy_of(CvtForImageClassification(preset_config(model, num_labels=1000)))
        preprocessor = Preprocessor.published(size or 224)
        return Checkpoint(model, network.config, labels, preprocessor, lambda: network)
    if size is not None:
        raise ConfigError(f"--size: applies only to {', '.join(PRESETS)}; {model} has its own size")
    return open_checkpoint(Storage(), model)


def read_images(uri: str, preprocessor: Preprocessor) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yields each decodable image of the shards: its bytes, and its pixels as uint8 (size, size, 3)."""
    section, storage, found = InputConfig(uri=uri, labels=False), Storage(), False
    options = DecodeOptions(preprocessor, MAX_PIXELS)
    for shard in list_input_shards(storage, section, "--images"):
        for sample in read_samples(storage, shard, ReadOptions(section)):
            if sample.image and (pixels := decode(sample.image, options).pixels) is not None:
                found = True
                yield sample.image, pixels
    if not found:
        raise NoShardsError(f"{uri}: no image can be decoded")


def load_images(uri: str, preprocessor: Preprocessor, count: int) -> np.ndarray:
    """Returns the first `count` decodable images or fewer, as uint8 (n, size, size, 3)."""
    return np.stack([pixels for _, pixels in itertools.islice(read_images(uri, preprocessor), count)])


def transformers_classifier(
    checkpoint: Checkpoint,
    device: str = "cpu",
    precision: str = "fp32",
    batch_size: int = 16,
    compiled: bool = False,
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that classifies images with transformers' model.

    The function takes uint8 images (n, size, size, 3) and returns float32 logits (n, classes).
    """
    dtype, preprocessor = PRECISIONS[precision], checkpoint.preprocessor
    fields = asdict(checkpoint.architecture)
    try:
        model = transformers.CvtForImageClassification(
            transformers.CvtConfig(**fields, num_labels=len(checkpoint.labels))
        )
    except IndexError:
        problem = transformers_problem(checkpoint.architecture)
        raise CheckpointError(f"model {checkpoint.name!r}: nothing to compare with: {problem}") from None
    if checkpoint.architecture.hidden_act == "quick_gelu":  # which transformers' CvT ignores
        for module in model.modules():
            if hasattr(module, "activation"):
                module.activation = QuickGELUActivation()
    model.load_state_dict(checkpoint.model.state_dict())
    model = model.to(device, dtype).eval()
    forward = torch.compile(model, dynamic=False) if compiled else model
    mean, std = (torch.tensor(each, device=device) for each in (preprocessor.mean, preprocessor.std))

    @torch.inference_mode()
    def classify(images: np.ndarray) -> np.ndarray:
        logits = []
        for batch in torch.from_numpy(images).split(batch_size):
            pixels = (batch.to(device) * preprocessor.rescale_factor - mean) / std
            logits.append(forward(pixels.permute(0, 3, 1, 2).to(dtype)).logits.float().cpu())
        return torch.cat(logits).numpy()

    return classify
