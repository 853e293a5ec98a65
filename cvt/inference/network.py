"""The network for inference: a simplified copy of the model, from uint8 pixels to logits.

This module also defines the interface of runtimes. `engine` chooses the runtime. `cvt.network` has the
layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cvt.network import CvtClassifier, CvtLayer
from cvt.preprocessing import Preprocessor


class EngineOutput(NamedTuple):
    """Results of the engine for n images.

    Attributes:
        logits: float32 (n, num_labels).
        embeddings: float32 (n, C), the input of the classifier after layer norm.
    """

    logits: np.ndarray
    embeddings: np.ndarray


#: Waits for a batch and returns its logits and embeddings in float32. Any thread may call this function.
Result = Callable[[], tuple[np.ndarray, np.ndarray]]


class Runtime(Protocol):
    """Runs the network on uint8 images (n, H, W, channels). Only one thread at a time may call a runtime.

    Attributes:
        batch_size: maximum number of images in one call. The engine may lower this number.
    """

    batch_size: int

    def __call__(self, images: np.ndarray | Tensor) -> Result:
        """Starts inference on 1 to `batch_size` images.

        The images must not change until the result is read.
        """


class InferenceNetwork(nn.Module):
    """Normalization, features and head, with fused batch norm and without outputs that the head ignores.

    Keys and values keep separate depthwise convolutions. A single convolution with twice the channels is five
    times slower on a CPU, because libraries have no kernel for it.

    The network has a copy of the model. `dtype` is the data type of the features. Normalization and head use
    float32, which costs almost no time, because logits in half precision have ties.
    """

    def __init__(self, model: nn.Module, preprocessor: Preprocessor, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = _simplify(model)
        self.model.cvt.to(dtype)
        self.dtype = dtype
        mean, std = np.array(preprocessor.mean), np.array(preprocessor.std)
        self.scale = nn.Buffer(torch.tensor(preprocessor.rescale_factor / std, dtype=torch.float32))
        self.shift = nn.Buffer(torch.tensor(-mean / std, dtype=torch.float32))

    def embed(self, pixels: Tensor) -> Tensor:
        """Computes the input of the classifier, float32 (n, C), from pixels, uint8 (n, H, W, channels)."""
        # Not fused into the first convolution: its zero padding equals the mean only after normalization.
        normalized = torch.addcmul(self.shift, pixels.float(), self.scale).to(self.dtype)
        return self.model.embed(normalized.permute(0, 3, 1, 2))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Computes logits and embeddings from pixels, uint8 (n, H, W, channels)."""
        embeddings = self.embed(pixels)
        return self.model.classifier(embeddings), embeddings

    def pack(self) -> None:
        """Converts the weights of linear layers to the layout of oneDNN, for inference on a CPU.

        In float32, this gains one eighth. In half precision, PyTorch always uses oneDNN. A packed network
        cannot be exported, compiled or moved.
        """
        if self.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            _pack(self.model.cvt)


def _simplify(model: nn.Module) -> CvtClassifier:
    network = CvtClassifier.copy_of(model).requires_grad_(False)
    module: Any
    for module in network.modules():
        if isinstance(getattr(module, "normalization", None), nn.BatchNorm2d):
            module.convolution = fuse_conv_bn_eval(module.convolution, module.normalization)
            module.normalization = nn.Identity()
        if isinstance(getattr(module, "activation", None), nn.GELU):
            module.activation = _InPlaceGELU()
    if network.config.cls_token[-1]:
        encoder: Any = network.cvt["encoder"]
        last_stage = encoder.stages[-1]
        last_stage.layers[-1] = ClassTokenLayer(last_stage.layers[-1])
    channels_last: Any = {"memory_format": torch.channels_last}  # a keyword that PyTorch's types lack
    return network.to(**channels_last)


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
    """A linear layer fused with the next operation, with the weight in the layout of oneDNN.

    `torch.compile` generates the same operations. PyTorch has no public API for them.
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
    """In-place GELU, which needs no second copy of the largest activation and uses the cache better."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(hidden_state)


class ClassTokenLayer(nn.Module):
    """A last layer that computes only the class token, which is all that the head uses.

    This saves 6 % of the operations of CvT-13.
    """

    def __init__(self, layer: CvtLayer) -> None:
        super().__init__()
        self.layer = layer
        layer.attention["attention"].convolution_projection_query = NoTokens()

    def forward(self, hidden_state: Tensor, height: int, width: int) -> Tensor:
        """Maps (B, T, C) to (B, T, C)."""
        layer, (token, others) = self.layer, hidden_state.tensor_split([1], dim=1)
        context = layer.attention["attention"](layer.layernorm_before(hidden_state), height, width)
        token = token + layer.attention["output"](context)
        token = token + layer.output(layer.intermediate(layer.layernorm_after(token)))
        return torch.cat((token, others), dim=1)


class NoTokens(nn.Module):
    """Replaces the convolution of the query and returns no tokens. The class token bypasses it."""

    def forward(self, image: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, 0, W)."""
        return image[:, :, :0]
