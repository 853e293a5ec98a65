"""CvtConfig: the shape of a CvT, in the fields of transformers' own CvtConfig, and what it refuses.

Files, the hub and labels are the business of transformers' PreTrainedConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedConfig

PROJECTION_METHODS = ("dw_bn", "avg", "linear")


class CvtConfig(PreTrainedConfig):
    """Configuration of a CvT; drop-in for `transformers.CvtConfig`, defaults are CvT-13's.

    Takes its fields and everything that PreTrainedConfig takes (`num_labels`, `id2label`, ...), by
    keyword. A field that is a sequence has one entry a stage.

    Attributes:
        num_channels: channels of the image.
        patch_sizes: kernel of the convolution that embeds a stage's input, in pixels or tokens.
        patch_stride: its stride.
        patch_padding: its zero padding.
        embed_dim: width of a stage's tokens.
        num_heads: attention heads; divides the width.
        depth: layers.
        mlp_ratio: hidden width of the MLP, as a multiple of `embed_dim`.
        attention_drop_rate: dropout of attention probabilities.
        drop_rate: dropout of embeddings, and of the outputs of attention and MLP.
        drop_path_rate: stochastic depth of the stage's last layer; rises to it linearly from 0.
        qkv_bias: whether query, key and value have a bias.
        cls_token: whether a class token joins the stage's tokens. It has the last stage's width.
        qkv_projection_method: how tokens become the input of query, key and value: "dw_bn", a
            depthwise convolution with batch norm; "avg", average pooling for key and value, none
            for the query; "linear", none at all.
        kernel_qkv: kernel of that convolution or pooling.
        padding_kv: its padding, for key and value.
        stride_kv: its stride, for key and value.
        padding_q: its padding, for the query.
        stride_q: its stride, for the query.
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: unused, as in transformers, whose CvT normalises with PyTorch's default of
            1e-5 whatever this says; kept so that files pass through unchanged.

    Raises:
        ValueError: the fields don't describe a model; names the field and the reason.
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
    """Refuses a configuration of which no model can be made.

    Args:
        config: a CvtConfig, this one's or transformers'.

    Raises:
        ValueError: names the field and the reason.
    """
    _check(config.num_channels, "num_channels", _is_count, "a positive integer")
    _check(config.initializer_range, "initializer_range", _is_not_negative, "a number from 0 up")
    for name, (holds, what) in _RULES.items():
        _check_entries(config, name, holds, what)
    for stage in range(len(config.embed_dim)):
        _check_stage(config, stage)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_padding(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _is_not_negative(value: Any) -> bool:
    return _is_positive(value) or (value == 0 and not isinstance(value, bool))


def _is_rate(value: Any) -> bool:
    return _is_not_negative(value) and value < 1


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_method(value: Any) -> bool:
    return value in PROJECTION_METHODS


_COUNT = (_is_count, "a positive integer")
_PADDING = (_is_padding, "an integer from 0 up")
_RATE = (_is_rate, "a number from 0 up and below 1")
_FLAG = (_is_flag, "true or false")

#: What an entry must be, of each field that has one a stage.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "embed_dim": _COUNT,
    "num_heads": _COUNT,
    "depth": _COUNT,
    "mlp_ratio": (_is_positive, "a positive number"),
    "patch_sizes": _COUNT,
    "patch_stride": _COUNT,
    "patch_padding": _PADDING,
    "attention_drop_rate": _RATE,
    "drop_rate": _RATE,
    "drop_path_rate": _RATE,
    "qkv_bias": _FLAG,
    "cls_token": _FLAG,
    "qkv_projection_method": (_is_method, f"one of {', '.join(PROJECTION_METHODS)}"),
    "kernel_qkv": _COUNT,
    "padding_kv": _PADDING,
    "stride_kv": _COUNT,
    "padding_q": _PADDING,
    "stride_q": _COUNT,
}


def _check(value: Any, name: str, holds: Callable[[Any], bool], what: str) -> None:
    if not holds(value):
        raise ValueError(f"CvtConfig: {name} must be {what}, not {value!r}")


def _check_entries(config: PreTrainedConfig, name: str, holds: Callable[[Any], bool], what: str) -> None:
    entries = getattr(config, name)
    if not isinstance(entries, list | tuple) or not entries:
        raise ValueError(f"CvtConfig: {name} must be a list with one entry a stage, not {entries!r}")
    if len(entries) != len(config.embed_dim):
        raise ValueError(
            f"CvtConfig: {name} has {len(entries)} entries and embed_dim {len(config.embed_dim)};"
            " both need one a stage"
        )
    for i, entry in enumerate(entries):
        _check(entry, f"{name}[{i}]", holds, what)


def _check_stage(config: PreTrainedConfig, i: int) -> None:
    """Checks what the fields of one stage must be to each other."""
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
