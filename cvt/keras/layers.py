"""The layers of CvT on Keras 3.

Each layer creates its variables in the order of PyTorch's state dict, so that `cvt.keras.models` can convert
weights. Images have the shape (B, H, W, C), for which every backend supports convolutions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
from keras import ops
from transformers import PreTrainedConfig

#: Epsilon of layer norm and batch norm in PyTorch and in transformers' TensorFlow classes. The default of
#: Keras is 1e-3.
EPSILON = 1e-5


def build(layer: keras.layers.Layer, *shape: int | None) -> keras.layers.Layer:
    """Creates the variables of a layer immediately, because the configuration has all widths."""
    layer.build((None, *shape))
    return layer


def _initializer(config: PreTrainedConfig) -> keras.initializers.Initializer:
    # Each layer needs its own initializer: an initializer without a seed always returns the same values.
    return keras.initializers.TruncatedNormal(stddev=config.initializer_range)


def dense(config: PreTrainedConfig, width: int, **options: Any) -> keras.layers.Layer:
    """Returns a linear layer with `width` outputs."""
    return keras.layers.Dense(width, kernel_initializer=_initializer(config), **options)


def layer_norm() -> keras.layers.Layer:
    """Returns a layer norm with PyTorch's epsilon."""
    return keras.layers.LayerNormalization(epsilon=EPSILON)


def quick_gelu(hidden_state: Any) -> Any:
    """Computes the activation of Microsoft's code."""
    return hidden_state * ops.sigmoid(1.702 * hidden_state)


def to_tokens(image: Any) -> Any:
    """Reshapes (B, H, W, C) to (B, H*W, C)."""
    _, height, width, channels = ops.shape(image)
    return ops.reshape(image, (-1, height * width, channels))


class CvtSelfAttention(keras.layers.Layer):
    """Multi-head attention with convolutional projections of query, key and value (section 3.2)."""

    def __init__(self, config: PreTrainedConfig, stage: int) -> None:
        super().__init__()
        self.width = config.embed_dim[stage]
        self.num_heads = config.num_heads[stage]
        self.scale = self.width**-0.5  # the total width of all heads, not the width of one head
        self.with_cls_token = config.cls_token[stage]
        key_value = config.stride_kv[stage], config.padding_kv[stage]
        self.convolutions = [
            self._projection(config, stage, config.stride_q[stage], config.padding_q[stage]),
            self._projection(config, stage, *key_value),
            self._projection(config, stage, *key_value),
        ]
        bias = config.qkv_bias[stage]
        self.projections = [
            build(dense(config, self.width, use_bias=bias), None, self.width) for _ in range(3)
        ]
        self.dropout = keras.layers.Dropout(config.attention_drop_rate[stage])
        self.built = True

    def _projection(
        self, config: PreTrainedConfig, stage: int, stride: int, padding: int
    ) -> keras.layers.Layer:
        """Returns a depthwise convolution with batch norm.

        For n tokens, the moving variance of PyTorch is n/(n-1) times as large.
        """
        method = config.qkv_projection_method[stage]
        if method == "avg":  # transformers' TensorFlow classes did not support it either
            raise ValueError("cvt.keras does not support qkv_projection_method 'avg'")
        if method == "linear":
            return keras.layers.Identity()
        convolution = keras.layers.DepthwiseConv2D(
            config.kernel_qkv[stage],
            strides=stride,
            use_bias=False,
            data_format="channels_last",
            depthwise_initializer=_initializer(config),
        )
        # The momentum in Keras is 1 minus the momentum in PyTorch.
        normalization = keras.layers.BatchNormalization(epsilon=EPSILON, momentum=0.9)
        pad = keras.layers.ZeroPadding2D(padding, data_format="channels_last")
        return build(keras.Sequential([pad, convolution, normalization]), None, None, self.width)

    def call(self, hidden_state: Any, height: int, width: int) -> Any:
        """Maps (B, T, C) to (B, T, C). T is H*W, plus 1 if there is a class token, which comes first."""
        first = int(self.with_cls_token)
        image = ops.reshape(hidden_state[:, first:], (-1, height, width, self.width))
        projected = []
        for convolution, linear in zip(self.convolutions, self.projections, strict=True):
            tokens = to_tokens(convolution(image))
            if self.with_cls_token:
                tokens = ops.concatenate([hidden_state[:, :1], tokens], axis=1)
            heads = (-1, ops.shape(tokens)[1], self.num_heads, self.width // self.num_heads)
            projected.append(ops.transpose(ops.reshape(linear(tokens), heads), (0, 2, 1, 3)))
        query, key, value = projected
        scores = ops.matmul(query * self.scale, ops.swapaxes(key, -1, -2))
        weights = self.dropout(ops.softmax(scores, axis=-1))
        context = ops.transpose(ops.matmul(weights, value), (0, 2, 1, 3))
        return ops.reshape(context, (-1, ops.shape(hidden_state)[1], self.width))


class CvtLayer(keras.layers.Layer):
    """Transformer block with pre-norm: layer norm before attention and before the MLP."""

    def __init__(self, config: PreTrainedConfig, stage: int, drop_path_rate: float) -> None:
        super().__init__()
        width, drop_rate = config.embed_dim[stage], config.drop_rate[stage]
        is_quick = getattr(config, "hidden_act", "gelu") == "quick_gelu"  # transformers' class lacks it
        activation = quick_gelu if is_quick else partial(ops.gelu, approximate=False)
        self.attention = CvtSelfAttention(config, stage)
        self.attention_output = build(dense(config, width), None, width)
        hidden = dense(config, int(width * config.mlp_ratio[stage]), activation=activation)
        self.mlp = build(keras.Sequential([hidden, dense(config, width)]), None, width)
        self.dropout = keras.layers.Dropout(drop_rate)
        self.layernorm_before = build(layer_norm(), None, width)
        self.layernorm_after = build(layer_norm(), None, width)
        # Stochastic depth (arXiv 1603.09382): drops the whole branch of random samples.
        self.drop_path = keras.layers.Dropout(drop_path_rate, noise_shape=(None, 1, 1))
        self.built = True

    def call(self, hidden_state: Any, height: int, width: int) -> Any:
        """Maps (B, T, C) to (B, T, C)."""
        context = self.attention(self.layernorm_before(hidden_state), height=height, width=width)
        hidden_state = hidden_state + self.drop_path(self.dropout(self.attention_output(context)))
        # Drops only the branch, as in the paper's code. transformers drops the whole sum.
        return hidden_state + self.drop_path(self.dropout(self.mlp(self.layernorm_after(hidden_state))))


class CvtStage(keras.layers.Layer):
    """One stage: token embedding, class token if configured, and transformer layers."""

    def __init__(self, config: PreTrainedConfig, stage: int) -> None:
        super().__init__()
        width, depth, rate = config.embed_dim[stage], config.depth[stage], config.drop_path_rate[stage]
        projection = keras.layers.Conv2D(
            width,
            config.patch_sizes[stage],
            strides=config.patch_stride[stage],
            data_format="channels_last",
            kernel_initializer=_initializer(config),
        )
        pad = keras.layers.ZeroPadding2D(config.patch_padding[stage], data_format="channels_last")
        dropout = keras.layers.Dropout(config.drop_rate[stage])
        width_in = config.embed_dim[stage - 1] if stage else config.num_channels
        embedding = keras.Sequential([pad, projection, layer_norm(), dropout])
        self.embedding = build(embedding, None, None, width_in)
        # The rate rises over the layers of a stage, as in the paper's code.
        self.blocks = [CvtLayer(config, stage, rate * i / max(depth - 1, 1)) for i in range(depth)]
        self.cls_token = None
        if config.cls_token[stage]:
            self.cls_token = self.add_weight(shape=(1, 1, width), initializer=_initializer(config))
        self.built = True

    def call(self, image: Any) -> tuple[Any, Any]:
        """Maps (B, H_in, W_in, C_in) to (B, H, W, C) and the class token, (B, 1, C) or None."""
        image = self.embedding(image)
        batch, height, width, channels = ops.shape(image)
        hidden_state = to_tokens(image)
        if self.cls_token is not None:
            cls_token = ops.broadcast_to(ops.cast(self.cls_token, hidden_state.dtype), (batch, 1, channels))
            hidden_state = ops.concatenate([cls_token, hidden_state], axis=1)
        for block in self.blocks:
            hidden_state = block(hidden_state, height=height, width=width)
        first = 0 if self.cls_token is None else 1
        image = ops.reshape(hidden_state[:, first:], (-1, height, width, channels))
        return image, hidden_state[:, :1] if first else None
