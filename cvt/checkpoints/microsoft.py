"""Converts weight names of Microsoft's checkpoints (https://github.com/microsoft/CvT).

`cvt.checkpoints.weights` reads the files. Microsoft's code uses QuickGELU. transformers and this package use
the exact GELU. The logits of the same weights therefore differ slightly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from cvt.architecture import Architecture
from cvt.errors import CheckpointError
from cvt.presets import PRESETS

#: Patterns in transformers' names, and their replacements in Microsoft's names.
_PARTS = {
    r"^cvt\.encoder\.stages\.": "stage",
    r"^layernorm\.": "norm.",
    r"^classifier\.": "head.",
    r"\.embedding\.convolution_embeddings\.projection\.": ".patch_embed.proj.",
    r"\.embedding\.convolution_embeddings\.normalization\.": ".patch_embed.norm.",
    r"\.layers\.": ".blocks.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.attention\.attention\.projection_([qkv])\w+\.": r".attn.proj_\1.",
    r"\.attention\.attention\.convolution_projection_([qkv])\w+\.\w+\.": r".attn.conv_proj_\1.",
    r"(\.conv_proj_[qkv])\.convolution\.": r"\1.conv.",
    r"(\.conv_proj_[qkv])\.normalization\.": r"\1.bn.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
}


def microsoft_key(key: str) -> str:
    """Returns Microsoft's name of a weight, given transformers' name."""
    for part, replacement in _PARTS.items():
        key = re.sub(part, replacement, key)
    return key


def microsoft_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of a model by Microsoft's names."""
    return {microsoft_key(key): tensor for key, tensor in model.state_dict().items()}


def rename_weights(weights: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """Renames Microsoft's names to transformers' names.

    Args:
        weights: weights by Microsoft's or transformers' names. Unknown names stay unchanged.
        keys: transformers' names of the weights of the model.
    """
    names = {microsoft_key(key): key for key in keys}
    return {names.get(key, key): tensor for key, tensor in weights.items()}


def unwrap_weights(content: Mapping[str, object]) -> Mapping[str, object]:
    """Removes the wrapper of a training script, and the prefix of DataParallel, from weights."""
    wrapped = (content.get("state_dict"), content.get("model"))
    weights = next((inner for inner in wrapped if isinstance(inner, Mapping)), content)
    if weights and all(str(key).startswith("module.") for key in weights):
        weights = {str(key).removeprefix("module."): value for key, value in weights.items()}
    return weights


def infer_architecture(weights: Mapping[str, Tensor]) -> Architecture:
    """Finds the published variant with the depths and widths of weights with Microsoft's names.

    Raises:
        CheckpointError: no variant has these depths and widths.
    """
    embed_dim: list[int] = []
    while (patches := weights.get(f"stage{len(embed_dim)}.patch_embed.proj.weight")) is not None:
        embed_dim.append(len(patches))
    if not embed_dim:
        raise CheckpointError("not a Microsoft CvT checkpoint: stage0.patch_embed.proj.weight is missing")
    if "head.weight" not in weights:
        raise CheckpointError("the checkpoint has no classifier: head.weight is missing")
    blocks = {match[0] for key in weights if (match := re.match(r"stage\d+\.blocks\.\d+\.", key))}
    depth = [sum(block.startswith(f"stage{i}.") for block in blocks) for i in range(len(embed_dim))]
    for fields in PRESETS.values():
        if (fields["embed_dim"], fields["depth"]) == (embed_dim, depth):
            return Architecture(**fields)
    raise CheckpointError(f"no published variant of CvT has embed_dim {embed_dim} and depth {depth}")


def image_size(file_name: str) -> int:
    """Returns the image size in pixels of a published checkpoint, from its file name."""
    return 384 if "-384x384-" in file_name else 224
