"""The names and shapes of Microsoft's own checkpoints of CvT (https://github.com/microsoft/CvT).

Its code has QuickGELU where transformers, and so this package, has the exact GELU: with the same weights,
logits differ a little from those of Microsoft's code, and not at all from transformers'.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from cvt.configuration import CvtConfig
from cvt.errors import CheckpointError
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


#: Wrappers in which training scripts save a model's weights.
_WRAPPERS = ("state_dict", "model")

_PARALLEL = "module."


def microsoft_key(key: str) -> str:
    """Microsoft's name of a weight that transformers calls `key`."""
    for part, replacement in _PARTS.items():
        key = re.sub(part, replacement, key)
    return key


def renamed(weights: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """Weights under transformers' names.

    Args:
        weights: by Microsoft's names, or by transformers' already.
        keys: transformers' names of all weights of the model; a name of no weight stays as it is.
    """
    names = {microsoft_key(key): key for key in keys}
    return {names.get(key, key): tensor for key, tensor in weights.items()}


def unwrapped(content: Mapping[str, object]) -> Mapping[str, object]:
    """The weights in what a training script saved: without its wrapper and the prefix `module.`."""
    for wrapper in _WRAPPERS:
        inner = content.get(wrapper)
        if isinstance(inner, Mapping):
            content = inner
            break
    if content and all(str(key).startswith(_PARALLEL) for key in content):
        content = {str(key).removeprefix(_PARALLEL): value for key, value in content.items()}
    return content


def infer_config(weights: Mapping[str, Tensor]) -> tuple[str, CvtConfig]:
    """Tells the published variant by the shapes of its weights.

    Depths, widths and the number of classes can be seen; the number of heads can't, and is the variant's.

    Args:
        weights: by Microsoft's names.

    Returns:
        The variant's name in `PRESETS`, and its configuration.

    Raises:
        CheckpointError: the weights are of no such variant; says what doesn't fit.
    """
    embed_dim: list[int] = []
    while (patches := weights.get(f"stage{len(embed_dim)}.patch_embed.proj.weight")) is not None:
        embed_dim.append(_rows(patches))
    if not embed_dim:
        raise CheckpointError("not a CvT of Microsoft's: it has no stage0.patch_embed.proj.weight")
    if "head.weight" not in weights:
        raise CheckpointError("it has no classifier (head.weight)")
    blocks = {match[0] for key in weights if (match := re.match(r"stage\d+\.blocks\.\d+\.", key))}
    depth = [sum(block.startswith(f"stage{i}.") for block in blocks) for i in range(len(embed_dim))]
    of_width = {name: fields for name, fields in PRESETS.items() if fields["embed_dim"] == embed_dim}
    for name, fields in of_width.items():
        if fields["depth"] == depth:
            return name, preset_config(name, num_labels=_rows(weights["head.weight"]))
    field, found = ("depth", depth) if of_width else ("embed_dim", embed_dim)
    known = ", ".join(f"{fields[field]} ({name})" for name, fields in (of_width or PRESETS).items())
    raise CheckpointError(f"no published variant of CvT has {field} {found}; known: {known}")


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 0


def image_size(file_name: str) -> int:
    """Height and width in pixels of the images of a published checkpoint, as its file's name says."""
    return 384 if "-384x384-" in file_name else 224
