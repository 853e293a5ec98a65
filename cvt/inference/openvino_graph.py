"""The features of `InferenceNetwork` as a graph of OpenVINO, layer by layer as in `cvt.network`.

Tracing the network would give the same graph, but takes seconds at each start of a classifier.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cvt.inference.network import ClassTokenLayer, InferenceNetwork, NoTokens
from cvt.network import QuickGELU


class FeatureGraph:
    """Maps nodes of OpenVINO to nodes. Tokens have the shape (B, T, C), and images (B, C, H, W).

    Args:
        openvino: the package.
        network: the network, on the CPU and in float32.
        shape: number, height, width and channels of the images.
    """

    def __init__(self, openvino: Any, network: InferenceNetwork, shape: tuple[int, ...]) -> None:
        self._ops = ops = openvino.opset13
        self._batch = shape[0]
        pixels = ops.parameter(list(shape), np.uint8)
        normalized = ops.multiply(ops.convert(pixels, "f32"), self._constant(network.scale))
        image = ops.transpose(ops.add(normalized, self._constant(network.shift)), [0, 3, 1, 2])
        model: Any = network.model
        for stage in model.cvt["encoder"].stages:
            image, cls_token = self._stage(stage, image)
        tokens = self._to_tokens(image) if cls_token is None else cls_token
        embeddings = ops.reduce_mean(self._normalize(tokens, model.layernorm), [1])
        #: Maps uint8 images to the input of the classifier, float32 (B, C).
        self.model = openvino.Model([embeddings], [pixels])

    def _stage(self, stage: Any, image: Any) -> tuple[Any, Any]:
        """Returns the image of a stage, and its class token or None."""
        embedding = stage.embedding.convolution_embeddings
        image = self._convolve(image, embedding.projection)
        height, width = image.shape[2:]
        tokens = self._normalize(self._to_tokens(image), embedding.normalization)
        if stage.cls_token is not None:
            cls_token = self._constant(stage.cls_token.expand(self._batch, -1, -1))
            tokens = self._ops.concat([cls_token, tokens], 1)
        for layer in stage.layers:
            tokens = self._layer(tokens, layer, height, width)
        if stage.cls_token is None:
            return self._to_image(tokens, height, width), None
        if isinstance(layer, ClassTokenLayer):
            return None, tokens
        cls_token, tokens = self._split(tokens, 1)
        return self._to_image(tokens, height, width), cls_token

    def _layer(self, tokens: Any, layer: Any, height: int, width: int) -> Any:
        """Returns the tokens of a layer; of a `ClassTokenLayer`, the class token only."""
        ops, kept = self._ops, tokens
        if isinstance(layer, ClassTokenLayer):
            layer, kept = layer.layer, self._split(tokens, 1)[0]
        attention, output = layer.attention["attention"], layer.attention["output"]
        context = self._attend(self._normalize(tokens, layer.layernorm_before), attention, height, width)
        kept = ops.add(kept, self._project(context, output.dense))
        hidden = self._project(self._normalize(kept, layer.layernorm_after), layer.intermediate.dense)
        is_quick = isinstance(layer.intermediate.activation, QuickGELU)
        hidden = ops.swish(hidden, np.float32(1.702)) if is_quick else ops.gelu(hidden, "erf")
        return ops.add(kept, self._project(hidden, layer.output.dense))

    def _attend(self, tokens: Any, attention: Any, height: int, width: int) -> Any:
        ops, cls_token = self._ops, None
        if attention.with_cls_token:
            cls_token, tokens = self._split(tokens, 1)
        image = self._to_image(tokens, height, width)

        def project(convolution: nn.Module, linear: nn.Linear) -> Any:
            parts = [] if cls_token is None else [cls_token]
            if not isinstance(convolution, NoTokens):
                parts.append(self._to_tokens(self._convolve(image, convolution)))
            heads = self._project(ops.concat(parts, 1), linear)
            shape = [self._batch, heads.shape[1], attention.num_heads, -1]
            return ops.transpose(ops.reshape(heads, shape, False), [0, 2, 1, 3])

        context = ops.scaled_dot_product_attention(
            project(attention.convolution_projection_query, attention.projection_query),
            project(attention.convolution_projection_key, attention.projection_key),
            project(attention.convolution_projection_value, attention.projection_value),
            scale=np.float32(attention.scale),
        )
        return ops.reshape(ops.transpose(context, [0, 2, 1, 3]), [self._batch, context.shape[2], -1], False)

    def _pool_average(self, image: Any, pool: Any) -> Any:
        """Returns sums, divided as PyTorch does at the edges, where OpenVINO's own pooling differs."""
        channels, size = image.shape[1:3]
        ones, kernel = (
            torch.ones(1, 1, size, size),
            torch.ones(channels, 1, 1, pool.kernel_size, pool.kernel_size),
        )
        averages = pool(ones)
        end = max(0, (averages.shape[-1] - 1) * pool.stride + pool.kernel_size - pool.padding - size)
        padded = nn.functional.pad(ones, (pool.padding, end, pool.padding, end))
        counts = nn.functional.conv2d(padded, kernel[0], stride=pool.stride)
        geometry = [pool.stride] * 2, [pool.padding] * 2, [end] * 2, [1, 1]
        sums = self._ops.group_convolution(image, self._constant(kernel), *geometry)
        return self._ops.multiply(sums, self._constant(averages / counts))

    def _convolve(self, image: Any, module: Any) -> Any:
        """Returns a convolution; for keys and values, average pooling or the image itself may replace it."""
        ops = self._ops
        if isinstance(module, nn.Identity):
            return image
        if isinstance(module, nn.AvgPool2d):
            return self._pool_average(image, module)
        if isinstance(module, nn.Sequential):  # the batch norm is fused
            return self._convolve(image, module[0].convolution)
        weight, padding = module.weight, list(module.padding)
        geometry = list(module.stride), padding, padding, list(module.dilation)
        if module.groups > 1:
            weight = weight.unflatten(0, (module.groups, -1))
            image = ops.group_convolution(image, self._constant(weight), *geometry)
        else:
            image = ops.convolution(image, self._constant(weight), *geometry)
        return self._add_bias(image, module.bias, (-1, 1, 1))

    def _project(self, tokens: Any, linear: nn.Linear) -> Any:
        product = self._ops.matmul(tokens, self._constant(linear.weight), False, True)
        return self._add_bias(product, linear.bias, (-1,))

    def _add_bias(self, node: Any, bias: Tensor | None, shape: tuple[int, ...]) -> Any:
        return node if bias is None else self._ops.add(node, self._constant(bias.reshape(shape)))

    def _normalize(self, tokens: Any, norm: nn.LayerNorm) -> Any:
        centered = self._ops.mvn(tokens, [-1], True, norm.eps, "inside_sqrt")
        scaled = self._ops.multiply(centered, self._constant(norm.weight))
        return self._ops.add(scaled, self._constant(norm.bias))

    def _split(self, tokens: Any, count: int) -> Any:
        return self._ops.variadic_split(tokens, 1, [count, -1]).outputs()

    def _to_tokens(self, image: Any) -> Any:
        batch, channels, height, width = image.shape
        tokens = self._ops.transpose(image, [0, 2, 3, 1])
        return self._ops.reshape(tokens, [batch, height * width, channels], False)

    def _to_image(self, tokens: Any, height: int, width: int) -> Any:
        image = self._ops.reshape(tokens, [self._batch, height, width, -1], False)
        return self._ops.transpose(image, [0, 3, 1, 2])

    def _constant(self, values: Tensor) -> Any:
        return self._ops.constant(np.ascontiguousarray(values.detach().numpy()))
