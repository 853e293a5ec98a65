"""The architecture of a CvT: fields, defaults, validation, published variants, and number of operations.

Imports neither torch nor transformers. `cvt.modeling` has the configuration class for transformers.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, create_model

from cvt.errors import describe_validation_error

#: Limits far above the published models: CvT-W24 has 24 layers, with a width of up to 1,024.
_MAX_LAYERS = 256
Width = Annotated[int, Field(gt=0, le=16_384)]
Counts = Sequence[Annotated[int, Field(gt=0, le=256)]]
Paddings = Sequence[Annotated[int, Field(ge=0, le=256)]]
Rates = Sequence[Annotated[float, Field(ge=0, lt=1)]]
Ratios = Sequence[Annotated[float, Field(gt=0, le=64)]]
Methods = Sequence[Literal["dw_bn", "avg", "linear"]]


@dataclasses.dataclass(kw_only=True)
class Architecture:
    """The architecture of a CvT. A sequence has one entry per stage. The defaults are those of CvT-13.

    Attributes:
        patch_sizes, patch_stride, patch_padding: kernel, stride and padding of the patch embedding.
        embed_dim: width of the tokens.
        num_heads: number of attention heads; must divide the width.
        depth: number of layers.
        mlp_ratio: hidden width of the MLP, as a multiple of `embed_dim`.
        attention_drop_rate: dropout rate of the attention probabilities.
        drop_rate: dropout rate of the embeddings, and of the outputs of attention and MLP.
        drop_path_rate: stochastic depth rate of the last layer. The rate rises linearly from 0 in the first
            layer.
        qkv_bias: whether the linear layers of query, key and value have a bias.
        cls_token: whether the stage has a class token. Its width is that of the last stage.
        qkv_projection_method: projection before the linear layers of query, key and value. "dw_bn":
            depthwise convolution with batch norm. "avg": average pooling of key and value. "linear": none.
        kernel_qkv: kernel of the projection.
        padding_kv, stride_kv: padding and stride of the projection for key and value.
        padding_q, stride_q: padding and stride of the projection for the query.
        hidden_act: activation of the MLP. "gelu" as in transformers, which ignores this field, or
            "quick_gelu" as in Microsoft's code.
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: unused, as in transformers. All layer norms use PyTorch's default of 1e-5.

    Raises:
        ValueError: the fields do not describe a valid model. The message names the field and the reason.
    """

    num_channels: Width = 3
    patch_sizes: Counts = (7, 3, 3)
    patch_stride: Counts = (4, 2, 2)
    patch_padding: Paddings = (2, 1, 1)
    embed_dim: Annotated[Sequence[Width], Field(min_length=1)] = (64, 192, 384)
    num_heads: Counts = (1, 3, 6)
    depth: Counts = (1, 2, 10)
    mlp_ratio: Ratios = (4.0, 4.0, 4.0)
    attention_drop_rate: Rates = (0.0, 0.0, 0.0)
    drop_rate: Rates = (0.0, 0.0, 0.0)
    drop_path_rate: Rates = (0.0, 0.0, 0.1)
    qkv_bias: Sequence[bool] = (True, True, True)
    cls_token: Sequence[bool] = (False, False, True)
    qkv_projection_method: Methods = ("dw_bn", "dw_bn", "dw_bn")
    kernel_qkv: Counts = (3, 3, 3)
    padding_kv: Paddings = (1, 1, 1)
    stride_kv: Counts = (2, 2, 2)
    padding_q: Paddings = (1, 1, 1)
    stride_q: Counts = (1, 1, 1)
    hidden_act: Literal["gelu", "quick_gelu"] = "gelu"
    initializer_range: Annotated[float, Field(ge=0)] = 0.02
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for name, entries in vars(self).items():  # pydantic would collect an error for each entry
            if isinstance(entries, list | tuple) and len(entries) > _MAX_LAYERS:
                raise ValueError(f"CvtConfig: {name} has more than {_MAX_LAYERS} entries")
        try:
            _Fields.model_validate(vars(self))
        except ValidationError as error:
            raise ValueError(f"CvtConfig: {describe_validation_error(error)}") from None
        for problem in self._problems():
            raise ValueError(f"CvtConfig: {problem}")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Returns the architecture of a config.json, or of the attributes of a CvtConfig.

        All other fields are ignored.
        """
        return cls(**{name: fields[name] for name in FIELDS if name in fields})

    def _problems(self) -> Iterator[str]:
        """Yields the fields that do not fit each other. The caller stops at the first one."""
        stages = len(self.embed_dim)
        for name, entries in vars(self).items():
            if isinstance(entries, list | tuple) and len(entries) != stages:
                count = f"{name} has {len(entries)} entries and embed_dim has {stages}"
                yield f"{count}; both need one entry per stage"
        if sum(self.depth) > _MAX_LAYERS:
            yield f"depth has {sum(self.depth)} layers in all, more than {_MAX_LAYERS}"
        for i, (width, heads, kernel) in enumerate(
            zip(self.embed_dim, self.num_heads, self.kernel_qkv, strict=True)
        ):
            if width % heads:
                yield f"embed_dim[{i}] ({width}) is not divisible by num_heads[{i}] ({heads})"
            if int(width * self.mlp_ratio[i]) < 1:
                product = f"mlp_ratio[{i}] ({self.mlp_ratio[i]}) times embed_dim[{i}] ({width})"
                yield f"{product} gives a hidden width of 0"
            if self.cls_token[i] and width != self.embed_dim[-1]:
                yield (
                    f"cls_token[{i}] needs embed_dim[{i}] ({width}) to equal the width of the last stage"
                    f" ({self.embed_dim[-1]}), which is the width of a class token"
                )
            # The output of attention is added to its input, so each token needs one query.
            method = self.qkv_projection_method[i]
            if method == "dw_bn" and (self.stride_q[i] != 1 or 2 * self.padding_q[i] != kernel - 1):
                yield (
                    f"stride_q[{i}] ({self.stride_q[i]}) and padding_q[{i}] ({self.padding_q[i]}) change the"
                    f" number of tokens: with kernel_qkv[{i}] ({kernel}) the stride must be 1 and the padding"
                    " (kernel - 1) / 2"
                )
            if method == "avg" and 2 * self.padding_kv[i] > kernel:
                yield (
                    f"padding_kv[{i}] ({self.padding_kv[i]}) must be at most half of"
                    f" kernel_qkv[{i}] ({kernel}) for average pooling"
                )


#: Fields of the published variants, by name: table 2 of arXiv 2103.15808, and the configurations of
#: https://github.com/microsoft/CvT. All other fields have their defaults.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "cvt-13": {"embed_dim": [64, 192, 384], "num_heads": [1, 3, 6], "depth": [1, 2, 10]},
    "cvt-21": {"embed_dim": [64, 192, 384], "num_heads": [1, 3, 6], "depth": [1, 4, 16]},
    "cvt-w24": {
        "embed_dim": [192, 768, 1024],
        "num_heads": [3, 12, 16],
        "depth": [2, 2, 20],
        "drop_path_rate": [0.0, 0.0, 0.3],
    },
}

#: Names of the fields.
FIELDS = tuple(field.name for field in dataclasses.fields(Architecture))

_Fields = create_model(
    "_Fields",
    __config__=ConfigDict(strict=True, allow_inf_nan=False),
    **inspect.get_annotations(Architecture, eval_str=True),
)


def token_sides(config: Any, side: int) -> Iterator[int]:
    """Yields the number of tokens along a side of an image in pixels, by stage; 0 if it is too small."""
    for kernel, stride, padding in zip(
        config.patch_sizes, config.patch_stride, config.patch_padding, strict=True
    ):
        side = max(0, (side + 2 * padding - kernel) // stride + 1)
        yield side


def count_macs(config: Architecture, num_labels: int, size: int) -> int:
    """Counts the multiply-accumulate operations (MACs) to classify one image of `size` x `size` pixels.

    The count includes convolutions, linear layers and both matrix products of attention. The count excludes
    biases, norms, softmax, pooling and activations. The values of arXiv 2103.15808 are up to 1.5 % lower:
    4.5, 7.1 and 193.2 billion for CvT-13 and CvT-21 at 224 pixels and for CvT-W24 at 384 pixels.
    """
    total, channels = num_labels * config.embed_dim[-1], config.num_channels
    for i, (dim, side) in enumerate(zip(config.embed_dim, token_sides(config, size), strict=True)):
        total += config.patch_sizes[i] ** 2 * channels * dim * side**2
        total += config.depth[i] * _layer_macs(config, i, side)
        channels = dim
    return total


def _layer_macs(config: Architecture, stage: int, side: int) -> int:
    """Counts the MACs of a transformer layer for `side` x `side` tokens."""
    dim, kernel = config.embed_dim[stage], config.kernel_qkv[stage]
    method = config.qkv_projection_method[stage]
    stride, padding = config.stride_kv[stage], config.padding_kv[stage]
    queries = keys = side**2
    convolutions = 0
    if method == "dw_bn":
        keys = ((side + 2 * padding - kernel) // stride + 1) ** 2
        convolutions = kernel**2 * dim * (queries + 2 * keys)
    elif method == "avg":
        rounded_up = -(-(side + 2 * padding - kernel) // stride) + 1
        # The last window must start within the image or its left padding.
        keys = (rounded_up - ((rounded_up - 1) * stride >= side + padding)) ** 2
    queries, keys = queries + config.cls_token[stage], keys + config.cls_token[stage]
    projections = dim**2 * (2 * queries + 2 * keys)
    products = 2 * queries * keys * dim
    mlp = 2 * dim * int(dim * config.mlp_ratio[stage]) * queries
    return convolutions + projections + products + mlp


def transformers_problem(config: Any) -> str | None:
    """Returns why transformers cannot load a model, or computes other logits; None if neither is the case."""
    for i, layers in enumerate(config.depth):
        if layers <= i:
            return f"transformers cannot load this model: its CvT needs depth[{i}] > {i}, not {layers}"
    if config.hidden_act != "gelu":
        return "transformers computes other logits for this model: its CvT ignores hidden_act, and uses GELU"
    return None
