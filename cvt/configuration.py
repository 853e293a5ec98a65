"""CvtConfig: the shape of a CvT, in the fields of transformers' CvtConfig, and its checks.

Files, the hub and labels belong to transformers' PreTrainedConfig.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, create_model
from transformers import PreTrainedConfig

from cvt.errors import described

Counts = Sequence[PositiveInt]
Paddings = Sequence[NonNegativeInt]
Rates = Sequence[Annotated[float, Field(ge=0, lt=1)]]
Ratios = Sequence[Annotated[float, Field(gt=0)]]
Methods = Sequence[Literal["dw_bn", "avg", "linear"]]


class CvtConfig(PreTrainedConfig):
    """Configuration of a CvT; drop-in for `transformers.CvtConfig`, defaults are CvT-13's.

    Takes these fields and those of PreTrainedConfig (`num_labels`, `id2label`, ...) by keyword. A sequence
    has one entry per stage.

    Attributes:
        patch_sizes, patch_stride, patch_padding: of the convolution that embeds a stage's input.
        embed_dim: width of a stage's tokens.
        num_heads: attention heads; divides the width.
        depth: number of layers.
        mlp_ratio: hidden width of the MLP, as a multiple of `embed_dim`.
        attention_drop_rate: dropout of attention probabilities.
        drop_rate: dropout of embeddings, and of the outputs of attention and MLP.
        drop_path_rate: stochastic depth of the stage's last layer; rises linearly from 0 in the first.
        qkv_bias: whether query, key and value have a bias.
        cls_token: whether a class token, of the last stage's width, joins the stage's tokens.
        qkv_projection_method: how tokens become the input of query, key and value: "dw_bn", a depthwise
            convolution with batch norm; "avg", average pooling for key and value; "linear", unchanged.
        kernel_qkv: kernel of that convolution or pooling.
        padding_kv, stride_kv: of that convolution or pooling, for key and value.
        padding_q, stride_q: of that convolution, for the query.
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: unused, as in transformers, whose CvT normalizes with PyTorch's default of 1e-5; kept
            so that files pass through unchanged.

    Raises:
        ValueError: the fields do not describe a model; names the field and the reason.
    """

    model_type = "cvt"

    num_channels: PositiveInt = 3
    patch_sizes: Counts = (7, 3, 3)
    patch_stride: Counts = (4, 2, 2)
    patch_padding: Paddings = (2, 1, 1)
    embed_dim: Annotated[Counts, Field(min_length=1)] = (64, 192, 384)
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
    initializer_range: Annotated[float, Field(ge=0)] = 0.02
    layer_norm_eps: float = 1e-12

    def __init__(self, **kwargs: Any) -> None:
        # Written out, because only from 5.4 on does PreTrainedConfig make a dataclass of this.
        for name in CvtConfig.__annotations__:
            setattr(self, name, kwargs.pop(name, getattr(CvtConfig, name)))
        super().__init__(**kwargs)
        check_architecture(self)


_Fields = create_model(
    "_Fields",
    __config__=ConfigDict(strict=True, allow_inf_nan=False),
    **inspect.get_annotations(CvtConfig, eval_str=True),
)


def check_architecture(config: PreTrainedConfig) -> None:
    """Refuses a CvtConfig, this one or transformers', that describes no model.

    Raises:
        ValueError: names the field and the reason.
    """
    fields = {name: getattr(config, name) for name in CvtConfig.__annotations__}
    try:
        _Fields.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"CvtConfig: {described(error)}") from None
    stages = len(config.embed_dim)
    for name, entries in fields.items():
        if isinstance(entries, list | tuple) and len(entries) != stages:
            raise ValueError(
                f"CvtConfig: {name} has {len(entries)} entries and embed_dim {stages}; both need one a stage"
            )
    for stage in range(stages):
        _check_stage(config, stage)


def _check_stage(config: PreTrainedConfig, i: int) -> None:
    """Checks the fields of one stage against each other."""
    width, heads, kernel = config.embed_dim[i], config.num_heads[i], config.kernel_qkv[i]
    if width % heads:
        raise ValueError(f"CvtConfig: embed_dim[{i}] ({width}) is not divisible by num_heads[{i}] ({heads})")
    if int(width * config.mlp_ratio[i]) < 1:
        raise ValueError(
            f"CvtConfig: mlp_ratio[{i}] ({config.mlp_ratio[i]}) leaves no hidden width"
            f" of embed_dim[{i}] ({width})"
        )
    if config.cls_token[i] and width != config.embed_dim[-1]:
        raise ValueError(
            f"CvtConfig: cls_token[{i}] is true, but a class token has the last stage's width"
            f" ({config.embed_dim[-1]}), not that of its tokens, embed_dim[{i}] ({width})"
        )
    # The attention's output is added to its input, so there must be one query for each token.
    method = config.qkv_projection_method[i]
    if method == "dw_bn" and (config.stride_q[i] != 1 or 2 * config.padding_q[i] != kernel - 1):
        raise ValueError(
            f"CvtConfig: stride_q[{i}] ({config.stride_q[i]}) and padding_q[{i}]"
            f" ({config.padding_q[i]}) don't keep the number of tokens: with kernel_qkv[{i}]"
            f" ({kernel}) the stride must be 1 and the padding half of the kernel less 1"
        )
    if method == "avg" and 2 * config.padding_kv[i] > kernel:
        raise ValueError(
            f"CvtConfig: padding_kv[{i}] ({config.padding_kv[i]}) must be at most half of"
            f" kernel_qkv[{i}] ({kernel}) for average pooling"
        )
