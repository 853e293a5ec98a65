"""The layers of CvT on Keras 3, with the variable names of PyTorch.

Images have the shape (B, H, W, C), for which every backend supports convolutions. `cvt.keras.models` loads
and saves models.
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


def _build(layer: keras.layers.Layer, *shape: int | None) -> keras.layers.Layer:
    """Creates the variables of a layer immediately, because the configuration has all widths."""
    layer.build((None, *shape))
    return layer


def _initializer(config: PreTrainedConfig) -> keras.initializers.Initializer:
    # Each layer needs its own initializer: an initializer without a seed always returns the same values.
    return keras.initializers.TruncatedNormal(stddev=config.initializer_range)


def dense(
    config: PreTrainedConfig, name: str, width_in: int, width: int, **options: Any
) -> keras.layers.Layer:
    """Creates a linear layer from `width_in` to `width` values."""
    layer = keras.layers.Dense(width, kernel_initializer=_initializer(config), name=name, **options)
    return _build(layer, None, width_in)


def layer_norm(name: str, width: int) -> keras.layers.Layer:
    """Creates a layer norm with PyTorch's epsilon."""
    return _build(keras.layers.LayerNormalization(epsilon=EPSILON, name=name), None, width)


def quick_gelu(hidden_state: Any) -> Any:
    """Computes the activation of Microsoft's code."""
    return hidden_state * ops.sigmoid(1.702 * hidden_state)


def to_tokens(image: Any) -> Any:
    """Reshapes (B, H, W, C) to (B, H*W, C)."""
    _, height, width, channels = ops.shape(image)
    return ops.reshape(image, (-1, height * width, channels))


class CvtDepthwiseProjection(keras.layers.Layer):
    """Depthwise convolution with batch norm.

    For n tokens, the moving variance of PyTorch is n/(n-1) times as large.
    """

    def __init__(self, config: PreTrainedConfig, stage: int, stride: int, padding: int, name: str) -> None:
        super().__init__(name=name)
        width = config.embed_dim[stage]
        self.padding = keras.layers.ZeroPadding2D(padding, data_format="channels_last")
        convolution = keras.layers.DepthwiseConv2D(
            config.kernel_qkv[stage],
            strides=stride,
            use_bias=False,
            data_format="channels_last",
            depthwise_initializer=_initializer(config),
            name=f"{name}-convolution",
        )
        self.convolution = _build(convolution, None, None, width)
        # The momentum in Keras is 1 minus the momentum in PyTorch.
        normalization = keras.layers.BatchNormalization(
            epsilon=EPSILON, momentum=0.9, name=f"{name}-normalization"
        )
        self.normalization = _build(normalization, None, None, width)
        self.built = True

    def call(self, image: Any) -> Any:
        """Maps (B, H_in, W_in, C) to (B, H, W, C)."""
        return self.normalization(self.convolution(self.padding(image)))


class CvtSelfAttention(keras.layers.Layer):
    """Multi-head attention with convolutional projections of query, key and value (section 3.2)."""

    def __init__(self, config: PreTrainedConfig, stage: int, name: str) -> None:
        super().__init__(name=name)
        self.width = config.embed_dim[stage]
        self.num_heads = config.num_heads[stage]
        self.scale = self.width**-0.5  # the total width of all heads, not the width of one head
        self.with_cls_token = config.cls_token[stage]
        parts, bias = ("query", "key", "value"), config.qkv_bias[stage]
        self.convolutions = [self._projection(config, stage, part, name) for part in parts]
        self.projections = [
            dense(config, f"{name}-projection_{part}", self.width, self.width, use_bias=bias)
            for part in parts
        ]
        self.dropout = keras.layers.Dropout(config.attention_drop_rate[stage])
        self.built = True

    @staticmethod
    def _projection(config: PreTrainedConfig, stage: int, part: str, name: str) -> keras.layers.Layer:
        query = part == "query"
        stride = (config.stride_q if query else config.stride_kv)[stage]
        padding = (config.padding_q if query else config.padding_kv)[stage]
        method = config.qkv_projection_method[stage]
        if method == "avg":  # transformers' TensorFlow classes did not support it either
            raise ValueError("cvt.keras does not support qkv_projection_method 'avg'")
        if method == "linear":
            return keras.layers.Identity()
        name = f"{name}-convolution_projection_{part}-convolution_projection"
        return CvtDepthwiseProjection(config, stage, stride, padding, name)

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

    def __init__(self, config: PreTrainedConfig, stage: int, drop_path_rate: float, name: str) -> None:
        super().__init__(name=name)
        width, drop_rate = config.embed_dim[stage], config.drop_rate[stage]
        hidden = int(width * config.mlp_ratio[stage])
        self.layernorm_before = layer_norm(f"{name}-layernorm_before", width)
        self.attention = CvtSelfAttention(config, stage, f"{name}-attention-attention")
        self.attention_output = dense(config, f"{name}-attention-output-dense", width, width)
        self.attention_dropout = keras.layers.Dropout(drop_rate)
        self.layernorm_after = layer_norm(f"{name}-layernorm_after", width)
        self.intermediate = dense(config, f"{name}-intermediate-dense", width, hidden)
        is_quick = getattr(config, "hidden_act", "gelu") == "quick_gelu"  # transformers' class lacks it
        self.activation = quick_gelu if is_quick else partial(ops.gelu, approximate=False)
        self.mlp_output = dense(config, f"{name}-output-dense", hidden, width)
        self.mlp_dropout = keras.layers.Dropout(drop_rate)
        # Stochastic depth (arXiv 1603.09382): drops the whole branch of random samples.
        self.drop_path = keras.layers.Dropout(drop_path_rate, noise_shape=(None, 1, 1))
        self.built = True

    def call(self, hidden_state: Any, height: int, width: int) -> Any:
        """Maps (B, T, C) to (B, T, C)."""
        context = self.attention(self.layernorm_before(hidden_state), height=height, width=width)
        branch = self.attention_dropout(self.attention_output(context))
        hidden_state = hidden_state + self.drop_path(branch)
        transformed = self.activation(self.intermediate(self.layernorm_after(hidden_state)))
        branch = self.mlp_dropout(self.mlp_output(transformed))
        # Drops only the branch, as in the paper's code. transformers drops the whole sum.
        return hidden_state + self.drop_path(branch)


class CvtStage(keras.layers.Layer):
    """One stage: token embedding, class token if configured, and transformer layers."""

    def __init__(self, config: PreTrainedConfig, stage: int, name: str) -> None:
        super().__init__(name=name)
        width, depth, rate = config.embed_dim[stage], config.depth[stage], config.drop_path_rate[stage]
        embeddings = f"{name}-embedding-convolution_embeddings"
        self.padding = keras.layers.ZeroPadding2D(config.patch_padding[stage], data_format="channels_last")
        projection = keras.layers.Conv2D(
            width,
            config.patch_sizes[stage],
            strides=config.patch_stride[stage],
            data_format="channels_last",
            kernel_initializer=_initializer(config),
            name=f"{embeddings}-projection",
        )
        width_in = config.embed_dim[stage - 1] if stage else config.num_channels
        self.projection = _build(projection, None, None, width_in)
        self.normalization = layer_norm(f"{embeddings}-normalization", width)
        self.dropout = keras.layers.Dropout(config.drop_rate[stage])
        # The rate rises over the layers of a stage, as in the paper's code.
        self.blocks = [
            CvtLayer(config, stage, rate * i / max(depth - 1, 1), f"{name}-layers-{i}") for i in range(depth)
        ]
        self.cls_token = None
        if config.cls_token[stage]:
            initializer = _initializer(config)
            self.cls_token = self.add_weight(shape=(1, 1, width), initializer=initializer, name="cls_token")
        self.built = True

    def call(self, image: Any) -> tuple[Any, Any]:
        """Maps (B, H_in, W_in, C_in) to (B, H, W, C) and the class token, (B, 1, C) or None."""
        image = self.projection(self.padding(image))
        batch, height, width, channels = ops.shape(image)
        hidden_state = self.dropout(self.normalization(to_tokens(image)))
        if self.cls_token is not None:
            cls_token = ops.broadcast_to(ops.cast(self.cls_token, hidden_state.dtype), (batch, 1, channels))
            hidden_state = ops.concatenate([cls_token, hidden_state], axis=1)
        for block in self.blocks:
            hidden_state = block(hidden_state, height=height, width=width)
        first = 0 if self.cls_token is None else 1
        image = ops.reshape(hidden_state[:, first:], (-1, height, width, channels))
        return image, hidden_state[:, :1] if first else None
