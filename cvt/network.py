"""The layers and the classifier of a CvT (arXiv 2103.15808), with the parameter names of transformers.

Needs only torch. `cvt.modeling` builds the drop-in classes for transformers from these layers, and
`cvt.inference.network` a network that is optimized for inference.

Tokens have the shape (B, H*W, C). This is the memory layout of an image in channels_last format, so neither
linear layers nor convolutions copy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cvt.architecture import Architecture


def _named(**modules: nn.Module) -> nn.Sequential:
    """Returns a sequence with named modules. The names become part of the parameter names."""
    return nn.Sequential(OrderedDict(modules))


def _to_tokens(image: Tensor) -> Tensor:
    """Reshapes (B, C, H, W) to (B, H*W, C)."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _to_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """Reshapes (B, H*W, C) to (B, C, H, W) in channels_last format. Copies only slices of tokens."""
    image = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return image.contiguous(memory_format=torch.channels_last)


class CvtConvEmbeddings(nn.Module):
    """Convolutional token embedding (section 3.1): overlapping patches, then layer norm."""

    def __init__(self, config: Architecture, stage: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(
            config.embed_dim[stage - 1] if stage else config.num_channels,
            config.embed_dim[stage],
            config.patch_sizes[stage],
            stride=config.patch_stride[stage],
            padding=config.patch_padding[stage],
        )
        self.normalization = nn.LayerNorm(config.embed_dim[stage])

    def forward(self, image: Tensor) -> Tensor:
        """Embeds an image (B, C_in, H_in, W_in) as (B, H, W, C)."""
        image = self.projection(image.contiguous(memory_format=torch.channels_last))
        # Not `image.permute(0, 2, 3, 1)`: OpenVINO is slower at normalizing four dimensions.
        return self.normalization(_to_tokens(image)).unflatten(1, image.shape[2:])


class CvtSelfAttention(nn.Module):
    """Multi-head attention with convolutional projections of query, key and value (section 3.2)."""

    def __init__(self, config: Architecture, stage: int) -> None:
        super().__init__()
        width = config.embed_dim[stage]
        self.num_heads = config.num_heads[stage]
        self.scale = width**-0.5  # the total width of all heads, not the width of one head
        self.drop_rate = config.attention_drop_rate[stage]
        self.with_cls_token = config.cls_token[stage]

        self.convolution_projection_query = self._projection(config, stage, query=True)
        self.convolution_projection_key = self._projection(config, stage)
        self.convolution_projection_value = self._projection(config, stage)
        self.projection_query = nn.Linear(width, width, bias=config.qkv_bias[stage])
        self.projection_key = nn.Linear(width, width, bias=config.qkv_bias[stage])
        self.projection_value = nn.Linear(width, width, bias=config.qkv_bias[stage])

    @staticmethod
    def _projection(config: Architecture, stage: int, query: bool = False) -> nn.Module:
        width, kernel = config.embed_dim[stage], config.kernel_qkv[stage]
        stride = (config.stride_q if query else config.stride_kv)[stage]
        padding = (config.padding_q if query else config.padding_kv)[stage]
        method = config.qkv_projection_method[stage]
        if method == "dw_bn":
            convolution = nn.Conv2d(width, width, kernel, stride, padding, groups=width, bias=False)
            normalization = nn.BatchNorm2d(width)
            return _named(convolution_projection=_named(convolution=convolution, normalization=normalization))
        if method == "avg" and not query:
            return nn.AvgPool2d(kernel, stride=stride, padding=padding, ceil_mode=True)
        return nn.Identity()

    def forward(self, hidden_state: Tensor, height: int, width: int) -> Tensor:
        """Maps (B, T, C) to (B, T, C). T is H*W, plus 1 if there is a class token, which comes first."""
        first = int(self.with_cls_token)
        cls_token, tokens = hidden_state[:, :first], hidden_state[:, first:]
        image = _to_image(tokens, height, width)

        def project(convolution: nn.Module, linear: nn.Module) -> Tensor:
            tokens = _to_tokens(convolution(image))
            if self.with_cls_token:
                tokens = torch.cat((cls_token, tokens), dim=1)
            return linear(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        context = F.scaled_dot_product_attention(
            project(self.convolution_projection_query, self.projection_query),
            project(self.convolution_projection_key, self.projection_key),
            project(self.convolution_projection_value, self.projection_value),
            dropout_p=self.drop_rate if self.training else 0.0,
            scale=self.scale,
        )
        return context.transpose(1, 2).flatten(2)


class CvtDropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drops the residual branch of random samples."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """Maps (B, ...) to (B, ...). The expected value does not change."""
        if not self.training or self.rate == 0.0:
            return branch
        kept = branch.new_empty([branch.shape[0]] + [1] * (branch.ndim - 1)).bernoulli_(1 - self.rate)
        return branch * (kept / (1 - self.rate))


class QuickGELU(nn.Module):
    """The activation of Microsoft's code, an approximation of GELU: x * sigmoid(1.702 x)."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        """Maps a tensor to a tensor of the same shape."""
        return hidden_state * torch.sigmoid(1.702 * hidden_state)


class CvtLayer(nn.Module):
    """Transformer block with pre-norm: layer norm before attention and before the MLP."""

    def __init__(self, config: Architecture, stage: int, drop_path_rate: float) -> None:
        super().__init__()
        width, drop_rate = config.embed_dim[stage], config.drop_rate[stage]
        hidden = int(width * config.mlp_ratio[stage])
        self.attention = nn.ModuleDict(
            {
                "attention": CvtSelfAttention(config, stage),
                "output": _named(dense=nn.Linear(width, width), dropout=nn.Dropout(drop_rate)),
            }
        )
        # transformers' CvtConfig has no `hidden_act`.
        is_quick = getattr(config, "hidden_act", "gelu") == "quick_gelu"
        activation = QuickGELU() if is_quick else nn.GELU()
        self.intermediate = _named(dense=nn.Linear(width, hidden), activation=activation)
        self.output = _named(dense=nn.Linear(hidden, width), dropout=nn.Dropout(drop_rate))
        self.drop_path = CvtDropPath(drop_path_rate)
        self.layernorm_before = nn.LayerNorm(width)
        self.layernorm_after = nn.LayerNorm(width)

    def forward(self, hidden_state: Tensor, height: int, width: int) -> Tensor:
        """Maps (B, T, C) to (B, T, C)."""
        context = self.attention["attention"](self.layernorm_before(hidden_state), height, width)
        hidden_state = hidden_state + self.drop_path(self.attention["output"](context))
        transformed = self.output(self.intermediate(self.layernorm_after(hidden_state)))
        # Drops only the branch, as in the paper's code. transformers drops the whole sum.
        return hidden_state + self.drop_path(transformed)


class CvtStage(nn.Module):
    """One stage: token embedding, class token if configured, and transformer layers."""

    def __init__(self, config: Architecture, stage: int, layer_class: type[CvtLayer]) -> None:
        super().__init__()
        depth, rate = config.depth[stage], config.drop_path_rate[stage]
        self.embedding = _named(
            convolution_embeddings=CvtConvEmbeddings(config, stage),
            dropout=nn.Dropout(config.drop_rate[stage]),
        )
        # The rate rises over the layers of a stage, as in the paper's code. transformers uses the rate of
        # layer i for all layers of stage i.
        rates = (rate * i / max(depth - 1, 1) for i in range(depth))
        self.layers = nn.ModuleList(layer_class(config, stage, rate) for rate in rates)
        token = nn.Parameter(torch.zeros(1, 1, config.embed_dim[-1])) if config.cls_token[stage] else None
        self.cls_token = token

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps (B, C_in, H_in, W_in) to (B, C, H, W) and the class token, (B, 1, C) or None."""
        embedded = self.embedding(image)
        height, width = embedded.shape[1:3]
        hidden_state = embedded.flatten(1, 2)
        if self.cls_token is not None:
            cls_token = self.cls_token.expand(image.shape[0], -1, -1)
            hidden_state = torch.cat((cls_token, hidden_state), dim=1)
        for layer in self.layers:
            hidden_state = layer(hidden_state, height, width)
        if self.cls_token is None:
            return _to_image(hidden_state, height, width), None
        return _to_image(hidden_state[:, 1:], height, width), hidden_state[:, :1]


class CvtEncoder(nn.Module):
    """All stages."""

    def __init__(self, config: Architecture, layer_class: type[CvtLayer] = CvtLayer) -> None:
        super().__init__()
        stages = (CvtStage(config, i, layer_class) for i in range(len(config.depth)))
        self.stages = nn.ModuleList(stages)

    def forward(
        self, image: Tensor, keep_states: bool = False
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Computes the features of normalized images (B, num_channels, H, W).

        Returns:
            The output of the last stage, (B, C, H, W); its class token, (B, 1, C) or None; and the output of
            each stage if `keep_states` is true.
        """
        cls_token: Tensor | None = None
        states: tuple[Tensor, ...] = ()
        for stage in self.stages:
            image, cls_token = stage(image)
            if keep_states:
                states += (image,)
        return image, cls_token, states


def pool(layernorm: nn.LayerNorm, image: Tensor, cls_token: Tensor | None) -> Tensor:
    """Returns the input of the classifier, (B, C): the class token, or else the mean of the tokens."""
    tokens = _to_tokens(image) if cls_token is None else cls_token
    # The head may have a higher precision than the features.
    return layernorm(tokens.to(layernorm.weight.dtype)).mean(dim=1)


def make_head(config: Architecture, num_labels: int) -> tuple[nn.LayerNorm, nn.Module]:
    """Returns layer norm and classifier. Without labels, the classifier has no effect."""
    width = config.embed_dim[-1]
    return nn.LayerNorm(width), nn.Linear(width, num_labels) if num_labels > 0 else nn.Identity()


class CvtClassifier(nn.Module):
    """CvT with a linear classifier: the network of `CvtForImageClassification`, without transformers."""

    def __init__(self, config: Architecture, num_labels: int) -> None:
        super().__init__()
        self.config = config
        self.num_labels = num_labels
        self.cvt = nn.ModuleDict({"encoder": CvtEncoder(config)})
        self.layernorm, self.classifier = make_head(config, num_labels)

    @classmethod
    def copy_of(cls, model: Any) -> Self:
        """Returns a float32 copy, in evaluation mode, of a CvtClassifier or CvtForImageClassification."""
        config = Architecture.from_dict(vars(model.config))
        return cls.of_weights(config, model.num_labels, model.state_dict())

    @classmethod
    def of_weights(cls, config: Architecture, num_labels: int, weights: Mapping[str, Tensor]) -> Self:
        """Returns a network in evaluation mode with copies of the weights, in float32 on the CPU."""
        with torch.device("meta"):  # skips random initialization, which takes longer than loading
            network = cls(config, num_labels)
        copies = {
            key: torch.empty(value.shape, dtype=value.dtype).copy_(weights[key])
            for key, value in network.state_dict().items()
        }
        # `assign` instead of `to_empty`, which imports sympy.
        network.load_state_dict(copies, assign=True)
        return network.eval()

    def embed(self, pixels: Tensor) -> Tensor:
        """Computes the input of the classifier, (B, C), from normalized images (B, num_channels, H, W)."""
        image, cls_token, _ = self.cvt["encoder"](pixels)
        return pool(self.layernorm, image, cls_token)

    def forward(self, pixels: Tensor) -> Tensor:
        """Computes logits, (B, num_labels), from normalized images (B, num_channels, H, W)."""
        return self.classifier(self.embed(pixels))
