"""Inference: uint8 images in, logits and embeddings out, on a CPU or a GPU.

Normalises on the device and runs a private, simplified copy of the model. Neither decodes nor
resizes images, nor says what logits mean.
"""

from __future__ import annotations

import copy
import logging
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cvt.configuration import CvtConfig
from cvt.modeling import CvtForImageClassification, CvtLayer
from cvt.preprocessing import Preprocessor

logger = logging.getLogger("cvt_label")

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# glibc maps and unmaps every allocation above 32 MiB afresh, and the kernel clears its pages each
# time: a fifth of a forward pass. On a CPU, batches are split so that no activation is so large.
LARGEST_CPU_ACTIVATION = 32 * 2**20


class EngineOutput(NamedTuple):
    """What the engine says of n images.

    Attributes:
        logits: float32 (n, num_labels).
        embeddings: float32 (n, C), the normalised vectors that the classifier sees.
    """

    logits: np.ndarray
    embeddings: np.ndarray


class Engine:
    """A model that is ready to classify batches.

    The same images in the same call give the same bits on the same device; in another company,
    they may differ by rounding. Not for calls from several threads at once.

    Args:
        model: the model; a copy of it is used and it stays as it is.
        preprocessor: what made the images; its mean, std and rescale factor are applied here.
        device: "cpu", "cuda", or "auto": a GPU if there is one.
        precision: "fp32", "bf16" or "fp16", of everything but the normalisation and the head. A CPU
            without instructions for them emulates the latter two, far slower than "fp32".
        batch_size: most images that go to the device at once; halved where a GPU runs out of memory.
        threads: CPU threads of PyTorch, for the whole process; its own choice if None.

    Raises:
        ValueError: an argument isn't one of these, or there is no GPU, or model and preprocessor
            differ in their channels.
    """

    def __init__(
        self,
        model: CvtForImageClassification,
        preprocessor: Preprocessor,
        *,
        device: str = "auto",
        precision: str = "fp32",
        batch_size: int = 64,
        threads: int | None = None,
    ) -> None:
        self.device = _find_device(device)
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
        channels = len(preprocessor.mean)
        if model.config.num_channels != channels:
            raise ValueError(
                f"the model takes images of {model.config.num_channels} channels,"
                f" its preprocessing makes {channels}"
            )
        if threads is not None:
            torch.set_num_threads(threads)

        self.batch_size = batch_size
        self._image_shape = (preprocessor.size, preprocessor.size, channels)
        self._split = batch_size
        if self.device.type == "cpu":
            self._split = min(batch_size, _images_at_once(model.config, preprocessor.size))
        self._dtype = PRECISIONS[precision]
        self._model = _simplified(model, self.device, self._dtype)
        mean, std = np.array(preprocessor.mean), np.array(preprocessor.std)
        self._scale = self._constant(preprocessor.rescale_factor / std)
        self._shift = self._constant(-mean / std)
        # Page-locked for a GPU; also because PyTorch doesn't take read-only arrays, which Ray gives.
        self._staged = torch.empty(
            (batch_size, *self._image_shape), dtype=torch.uint8, pin_memory=self.device.type == "cuda"
        )

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> EngineOutput:
        """Classifies images, uint8 (n, size, size, channels).

        Raises:
            ValueError: the array has another type or shape.
        """
        if images.dtype != np.uint8 or images.shape[1:] != self._image_shape:
            wanted = ", ".join(map(str, self._image_shape))
            raise ValueError(f"images must be uint8 (n, {wanted}), not {images.dtype} {images.shape}")
        config = self._model.config
        width = config.embed_dim[-1]
        logits = np.empty((len(images), config.num_labels or width), np.float32)
        embeddings = np.empty((len(images), width), np.float32)
        # cuDNN left to itself may take another algorithm, or TensorFloat-32, from run to run.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            start = 0
            while start < len(images):
                rows = slice(start, start + self.batch_size)
                try:
                    results = [result.cpu().numpy() for result in self._run(images[rows])]
                except torch.OutOfMemoryError:
                    if self.batch_size == 1:
                        raise
                    self._halve()
                    continue
                logits[rows], embeddings[rows] = results
                start = rows.stop
        return EngineOutput(logits, embeddings)

    def _halve(self) -> None:
        """Goes on with half the batch, for good: others may use the GPU too."""
        self.batch_size //= 2
        self._split = min(self._split, self.batch_size)
        torch.cuda.empty_cache()
        logger.warning("the GPU is out of memory: going on with batches of %d", self.batch_size)

    def _run(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        staged = self._staged[: len(images)]
        staged.numpy()[:] = images
        pixels = staged.to(self.device, non_blocking=True)
        parts = [self._forward(part) for part in pixels.tensor_split(-(-len(pixels) // self._split))]
        logits, embeddings = zip(*parts, strict=True)
        return torch.cat(logits), torch.cat(embeddings)

    def _forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        # Not folded into the first convolution: its zero padding stands for the mean.
        normalised = torch.addcmul(self._shift, pixels.float(), self._scale).to(self._dtype)
        features = self._model.cvt(normalised.permute(0, 3, 1, 2), return_dict=True)
        embeddings = self._model.pool(features.last_hidden_state, features.cls_token_value)
        return self._model.classifier(embeddings), embeddings

    def _constant(self, values: np.ndarray) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)


def _find_device(name: str) -> torch.device:
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but PyTorch finds no GPU")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _simplified(
    model: CvtForImageClassification, device: torch.device, dtype: torch.dtype
) -> CvtForImageClassification:
    """A copy for inference, without batch norm and without what the head doesn't see of the last layer.

    The head stays in float32, for next to no time: logits in half precision have ties.
    """
    model = copy.deepcopy(model).float().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(getattr(module, "normalization", None), nn.BatchNorm2d):
            module.convolution = fuse_conv_bn_eval(module.convolution, module.normalization)
            module.normalization = nn.Identity()
        if isinstance(getattr(module, "activation", None), nn.GELU):
            module.activation = _InPlaceGELU()
    if model.config.cls_token[-1]:
        last_stage: Any = [*model.cvt.encoder["stages"].children()][-1]
        last_stage.layers[-1] = _ClassTokenLayer(last_stage.layers[-1])
    model.to(device=device, memory_format=torch.channels_last)
    model.cvt.to(dtype)
    return model


class _InPlaceGELU(nn.Module):
    """GELU without a second copy of the largest activation, so that more of it stays in the cache."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(hidden_state)


class _ClassTokenLayer(nn.Module):
    """A layer for the class token alone, which attends to all tokens: these pass through unchanged.

    In the last layer, that saves 6 % of CvT-13's operations, and changes nothing that the head sees.
    """

    def __init__(self, layer: CvtLayer) -> None:
        super().__init__()
        self.layer = layer
        layer.attention["attention"].convolution_projection_query = _NoTokens()

    def forward(self, hidden_state: Tensor, height: int, width: int) -> Tensor:
        layer, (token, others) = self.layer, hidden_state.tensor_split([1], dim=1)
        context = layer.attention["attention"](layer.layernorm_before(hidden_state), height, width)
        token = token + layer.attention["output"](context)
        token = token + layer.output(layer.intermediate(layer.layernorm_after(token)))
        return torch.cat((token, others), dim=1)


class _NoTokens(nn.Module):
    """Instead of a query's convolution: leaves only the class token, which passes by it, to query."""

    def forward(self, image: Tensor) -> Tensor:
        return image[:, :, :0]


def _images_at_once(config: CvtConfig, size: int) -> int:
    """Images for which the largest activation, inside an MLP, is below LARGEST_CPU_ACTIVATION."""
    largest = 0
    for i, width in enumerate(config.embed_dim):
        size = (size + 2 * config.patch_padding[i] - config.patch_sizes[i]) // config.patch_stride[i]
        size += 1
        largest = max(largest, size**2 * math.ceil(width * max(config.mlp_ratio[i], 1)))
    return max(1, (LARGEST_CPU_ACTIVATION - 1) // (4 * largest))
