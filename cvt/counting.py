"""Counts the operations of a CvT. `jobs.benchmarks` measures speed."""

from __future__ import annotations

from cvt.architecture import Architecture, token_sides


def count_macs(config: Architecture, num_labels: int, height: int, width: int) -> int:
    """Counts the multiply-accumulate operations (MACs) to classify one image.

    The count includes convolutions, linear layers and both matrix products of attention. The count excludes
    biases, norms, softmax, pooling and activations. The values of arXiv 2103.15808 are up to 1.5 % lower:
    4.5, 7.1 and 193.2 billion for CvT-13 and CvT-21 at 224 pixels and for CvT-W24 at 384 pixels.
    """
    total, channels = num_labels * config.embed_dim[-1], config.num_channels
    sides = zip(token_sides(config, height), token_sides(config, width), strict=True)
    for i, (dim, stage_sides) in enumerate(zip(config.embed_dim, sides, strict=True)):
        total += config.patch_sizes[i] ** 2 * channels * dim * stage_sides[0] * stage_sides[1]
        total += config.depth[i] * _layer_macs(config, i, stage_sides)
        channels = dim
    return total


def _layer_macs(config: Architecture, stage: int, sides: tuple[int, int]) -> int:
    """Counts the MACs of a transformer layer for tokens of an image with these sides."""
    dim, kernel = config.embed_dim[stage], config.kernel_qkv[stage]
    method = config.qkv_projection_method[stage]
    queries = keys = sides[0] * sides[1]
    convolutions = 0
    if method != "linear":
        stride, padding = config.stride_kv[stage], config.padding_kv[stage]
        height, width = (_output_side(side, kernel, stride, padding, ceil=method == "avg") for side in sides)
        keys = height * width
    if method == "dw_bn":
        convolutions = kernel**2 * dim * (queries + 2 * keys)
    queries, keys = queries + config.cls_token[stage], keys + config.cls_token[stage]
    projections = dim**2 * (2 * queries + 2 * keys)
    products = 2 * queries * keys * dim
    mlp = 2 * dim * int(dim * config.mlp_ratio[stage]) * queries
    return convolutions + projections + products + mlp


def _output_side(side: int, kernel: int, stride: int, padding: int, ceil: bool = False) -> int:
    """Returns the side of the output of a convolution, or of a pooling that rounds up (`ceil`)."""
    span = side + 2 * padding - kernel
    if not ceil:
        return span // stride + 1
    rounded = -(-span // stride) + 1
    # The last window must start within the image or its left padding.
    return rounded - ((rounded - 1) * stride >= side + padding)
