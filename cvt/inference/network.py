"""The network that inference runs: a simplified copy of the model, from uint8 pixels to logits.

Also the interface of what runs the network; `engine` decides which runtime to use.

The model for training, and its drop-in interface, is `cvt.modeling`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cvt.modeling import CvtForImageClassification, CvtLayer
from cvt.preprocessing import Preprocessor


class EngineOutput(NamedTuple):
    """The engine's result for n images.

    Attributes:
        logits: float32 (n, num_labels).
        embeddings: float32 (n, C), the normalized vectors that the classifier sees.
    """

    logits: np.ndarray
    embeddings: np.ndarray


#: Waits for a batch and returns its logits and embeddings, float32. Any thread may call it.
Result = Callable[[], tuple[np.ndarray, np.ndarray]]


class Runtime(Protocol):
    """Runs the network: uint8 (n, H, W, channels) to logits and embeddings, float32.

    One thread at a time may call it.

    Attributes:
        batch_size: maximum number of images in one call; may be lowered.
    """

    batch_size: int

    def __call__(self, images: np.ndarray | Tensor) -> Result:
        """Starts inference on 1 to `batch_size` images, which must not change until the result is read."""


class InferenceNetwork(nn.Module):
    """Normalization, features and head, without batch norm and without results that the head never sees.

    Keys and values keep a depthwise convolution each: on a CPU, one with twice the channels is five times
    slower, because libraries have no kernel for it.

    Args:
        model: the model, which is copied.
        preprocessor: its mean, std and rescale factor are applied here.
        dtype: of the features. Normalization and head stay in float32, which costs almost no time: logits in
            half precision have ties.
    """

    def __init__(
        self, model: CvtForImageClassification, preprocessor: Preprocessor, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model = _simplified(model)
        self.model.cvt.to(dtype)
        self.dtype = dtype
        mean, std = np.array(preprocessor.mean), np.array(preprocessor.std)
        self.scale = nn.Buffer(torch.tensor(preprocessor.rescale_factor / std, dtype=torch.float32))
        self.shift = nn.Buffer(torch.tensor(-mean / std, dtype=torch.float32))

    def embed(self, pixels: Tensor) -> Tensor:
        """Uint8 (n, H, W, channels) to the vectors that the classifier sees, float32 (n, C)."""
        # Not folded into the first convolution, whose zero padding represents the mean.
        normalized = torch.addcmul(self.shift, pixels.float(), self.scale).to(self.dtype)
        features = self.model.cvt(normalized.permute(0, 3, 1, 2), return_dict=True)
        return self.model.pool(features.last_hidden_state, features.cls_token_value)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Uint8 (n, H, W, channels) to logits and embeddings."""
        embeddings = self.embed(pixels)
        return self.model.classifier(embeddings), embeddings

    def pack(self) -> None:
        """Lays out the weights of linear layers for oneDNN, if PyTorch has it, for inference on a CPU.

        An eighth faster than the library that PyTorch uses for float32; in half precision PyTorch uses oneDNN
        anyway. Afterwards the network cannot be exported, compiled or moved.
        """
        if self.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            _pack(self.model.cvt)


def _simplified(model: CvtForImageClassification) -> CvtForImageClassification:
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
    return model.to(memory_format=torch.channels_last)


def _pack(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if not isinstance(child, nn.Linear):
            _pack(child)
        elif isinstance(getattr(module, "activation", None), _InPlaceGELU):
            setattr(module, name, _PackedLinear(child, "gelu", "none"))
            module.activation = nn.Identity()
        else:
            setattr(module, name, _PackedLinear(child, "none", ""))


class _PackedLinear(nn.Module):
    """A linear layer and the operation after it, with oneDNN's own layout of the weight.

    `torch.compile` makes the same of linear layers. PyTorch has no public interface to it.
    """

    def __init__(self, linear: nn.Linear, operation: str, algorithm: str) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias
        self._operation, self._algorithm = operation, algorithm

    def forward(self, hidden_state: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(
            hidden_state, self.weight, self.bias, self._operation, [], self._algorithm
        )


class _InPlaceGELU(nn.Module):
    """GELU without a second copy of the largest activation, of which more stays in the cache."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(hidden_state)


class _ClassTokenLayer(nn.Module):
    """A layer that computes the class token only; the other tokens pass through unchanged.

    As the last layer it saves 6 % of CvT-13's operations. The head sees the class token only.
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
    """Replaces the query's convolution and drops its tokens; the class token does not pass through it."""

    def forward(self, image: Tensor) -> Tensor:
        return image[:, :, :0]
