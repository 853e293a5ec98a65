"""CvtConfig: the shape of a CvT, in the fields of transformers' CvtConfig, and its checks.

Files, the hub and labels belong to transformers' PreTrainedConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedConfig

from cvt.checks import is_flag, is_integer, is_number

PROJECTION_METHODS = ("dw_bn", "avg", "linear")


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

    num_channels: int = 3
    patch_sizes: Sequence[int] = (7, 3, 3)
    patch_stride: Sequence[int] = (4, 2, 2)
    patch_padding: Sequence[int] = (2, 1, 1)
    embed_dim: Sequence[int] = (64, 192, 384)
    num_heads: Sequence[int] = (1, 3, 6)
    depth: Sequence[int] = (1, 2, 10)
    mlp_ratio: Sequence[float] = (4.0, 4.0, 4.0)
    attention_drop_rate: Sequence[float] = (0.0, 0.0, 0.0)
    drop_rate: Sequence[float] = (0.0, 0.0, 0.0)
    drop_path_rate: Sequence[float] = (0.0, 0.0, 0.1)
    qkv_bias: Sequence[bool] = (True, True, True)
    cls_token: Sequence[bool] = (False, False, True)
    qkv_projection_method: Sequence[str] = ("dw_bn", "dw_bn", "dw_bn")
    kernel_qkv: Sequence[int] = (3, 3, 3)
    padding_kv: Sequence[int] = (1, 1, 1)
    stride_kv: Sequence[int] = (2, 2, 2)
    padding_q: Sequence[int] = (1, 1, 1)
    stride_q: Sequence[int] = (1, 1, 1)
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12

    def __init__(self, **kwargs: Any) -> None:
        # Written out, because only from 5.4 on does PreTrainedConfig make a dataclass of this.
        for name in CvtConfig.__annotations__:
            setattr(self, name, kwargs.pop(name, getattr(CvtConfig, name)))
        super().__init__(**kwargs)
        check_architecture(self)


def check_architecture(config: PreTrainedConfig) -> None:
    """Refuses a CvtConfig, this one or transformers', that describes no model.

    Raises:
        ValueError: names the field and the reason.
    """
    _check("num_channels", config.num_channels, *_COUNT)
    _check("initializer_range", config.initializer_range, *_NOT_NEGATIVE)
    for name, rule in _RULES.items():
        entries = getattr(config, name)
        if not isinstance(entries, list | tuple) or not entries:
            raise ValueError(f"CvtConfig: {name} must be a list with one entry a stage, not {entries!r}")
        if len(entries) != len(config.embed_dim):
            raise ValueError(
                f"CvtConfig: {name} has {len(entries)} entries and embed_dim {len(config.embed_dim)};"
                " both need one a stage"
            )
        for stage, entry in enumerate(entries):
            _check(f"{name}[{stage}]", entry, *rule)
    for stage in range(len(config.embed_dim)):
        _check_stage(config, stage)


def _check(name: str, value: Any, holds: Callable[[Any], bool], wanted: str) -> None:
    if not holds(value):
        raise ValueError(f"CvtConfig: {name} must be {wanted}, not {value!r}")


_COUNT = (lambda value: is_integer(value) and value > 0, "a positive integer")
_PADDING = (lambda value: is_integer(value) and value >= 0, "an integer from 0 up")
_POSITIVE = (lambda value: is_number(value) and value > 0, "a positive number")
_NOT_NEGATIVE = (lambda value: is_number(value) and value >= 0, "a number from 0 up")
_RATE = (lambda value: is_number(value) and 0 <= value < 1, "a number from 0 up and below 1")
_FLAG = (is_flag, "true or false")
_METHOD = (lambda value: value in PROJECTION_METHODS, f"one of {', '.join(PROJECTION_METHODS)}")

#: What an entry must be, for each field with one entry per stage; embed_dim first, which counts the stages.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("embed_dim", "num_heads", "depth", "patch_sizes", "patch_stride"), _COUNT),
    **dict.fromkeys(("kernel_qkv", "stride_kv", "stride_q"), _COUNT),
    **dict.fromkeys(("patch_padding", "padding_kv", "padding_q"), _PADDING),
    **dict.fromkeys(("attention_drop_rate", "drop_rate", "drop_path_rate"), _RATE),
    **dict.fromkeys(("qkv_bias", "cls_token"), _FLAG),
    "mlp_ratio": _POSITIVE,
    "qkv_projection_method": _METHOD,
}


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
    method = config.qkv_projection_method[i]
    # The attention's output is added to its input, so there must be one query for each token.
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
