"""Names and shapes of weights in Microsoft's checkpoints (https://github.com/microsoft/CvT).

Reading the files belongs to `cvt.checkpoints.weights`. Microsoft's code has QuickGELU where transformers and
this package have the exact GELU, so that logits of the same weights differ slightly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from cvt.configuration import CvtConfig
from cvt.errors import CheckpointError
from cvt.modeling import CvtForImageClassification
from cvt.presets import PRESETS, preset_config

#: Parts of transformers' names, and Microsoft's.
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
    """Microsoft's name of a weight, for transformers' name."""
    for part, replacement in _PARTS.items():
        key = re.sub(part, replacement, key)
    return key


def microsoft_weights(model: CvtForImageClassification) -> dict[str, Tensor]:
    """A model's weights under Microsoft's names."""
    return {microsoft_key(key): tensor for key, tensor in model.state_dict().items()}


def renamed(weights: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """Weights under transformers' names, of which `keys` are the model's; other names stay unchanged."""
    names = {microsoft_key(key): key for key in keys}
    return {names.get(key, key): tensor for key, tensor in weights.items()}


def unwrapped(content: Mapping[str, object]) -> Mapping[str, object]:
    """The weights in a training script's file: without its wrapper and DataParallel's prefix."""
    wrapped = (content.get("state_dict"), content.get("model"))
    weights = next((inner for inner in wrapped if isinstance(inner, Mapping)), content)
    if weights and all(str(key).startswith("module.") for key in weights):
        weights = {str(key).removeprefix("module."): value for key, value in weights.items()}
    return weights


def infer_config(weights: Mapping[str, Tensor]) -> CvtConfig:
    """Finds the published variant by the depths and widths of weights with Microsoft's names.

    Returns:
        The variant's configuration, with the weights' number of classes.

    Raises:
        CheckpointError: no variant has such weights.
    """
    embed_dim: list[int] = []
    while (patches := weights.get(f"stage{len(embed_dim)}.patch_embed.proj.weight")) is not None:
        embed_dim.append(len(patches))
    if not embed_dim:
        raise CheckpointError("not a CvT of Microsoft's: it has no stage0.patch_embed.proj.weight")
    if "head.weight" not in weights:
        raise CheckpointError("it has no classifier (head.weight)")
    blocks = {match[0] for key in weights if (match := re.match(r"stage\d+\.blocks\.\d+\.", key))}
    depth = [sum(block.startswith(f"stage{i}.") for block in blocks) for i in range(len(embed_dim))]
    for name, fields in PRESETS.items():
        if (fields["embed_dim"], fields["depth"]) == (embed_dim, depth):
            return preset_config(name, num_labels=len(weights["head.weight"]))
    raise CheckpointError(f"no published variant of CvT has embed_dim {embed_dim} and depth {depth}")


def image_size(file_name: str) -> int:
    """Height and width in pixels of a published checkpoint's images, by the name of its file."""
    return 384 if "-384x384-" in file_name else 224
