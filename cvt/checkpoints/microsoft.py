"""Converts weight names of Microsoft's checkpoints (https://github.com/microsoft/CvT).

`cvt.checkpoints.weights` reads the files. Microsoft's code uses QuickGELU. transformers and this package use
the exact GELU, unless `hidden_act` in config.json is "quick_gelu". `cvt-label convert` sets this field.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

from cvt.architecture import PRESETS, Architecture
from cvt.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("cvt_label")

#: Keys of weights in the files of training scripts, in order of precedence; the first two are no EMA.
_WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema", "ema_state_dict", "ema")
_PLAIN = set(_WRAPPERS[:2])

#: Prefixes of DataParallel, torch.compile, Lightning and averages of weights.
_EMA_PREFIXES = ("ema.", "ema_model.", "model_ema.")
_PREFIX = re.compile(r"(module|_orig_mod|model|ema|ema_model|model_ema)\.")

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


def rename_weights(weights: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """Renames Microsoft's names to the names `keys` of transformers. Other names stay unchanged."""
    names = {microsoft_key(key): key for key in keys}
    return {names.get(key, key): tensor for key, tensor in weights.items()}


def unwrap_weights(content: Mapping[str, object], file: str) -> dict[str, object]:
    """Removes the wrapper of a training script, and the prefixes that modules add to names.

    Returns the moving average (EMA) only if the file has no other weights; logs the choice.
    """
    wrappers = [key for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
    weights = cast(Mapping[str, object], content[wrappers[0]]) if wrappers else content
    weights = {str(key): value for key, value in weights.items() if key != "n_averaged"}
    plain = {key: value for key, value in weights.items() if not key.startswith(_EMA_PREFIXES)}
    if 0 < len(plain) < len(weights) or 0 < len(_PLAIN & set(wrappers)) < len(wrappers):
        cause = "has weights and their moving average (EMA): loading the weights without averaging"
        logger.warning("%s %s", file, cause)
    weights = plain or weights
    while weights and (match := _PREFIX.match(min(weights))) and all(k.startswith(match[0]) for k in weights):
        weights = {key.removeprefix(match[0]): value for key, value in weights.items()}
    return weights


def infer_architecture(weights: Mapping[str, Tensor]) -> Architecture:
    """Finds the published variant with the depths and widths of weights with Microsoft's names."""
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


def image_size(file_name: str, config: Architecture) -> tuple[int, str | None]:
    """Returns the image size of a published checkpoint, and why the size is uncertain; None if it is not."""
    is_w24 = list(config.embed_dim) == PRESETS["cvt-w24"]["embed_dim"]
    named = {size for size in (224, 384) if re.search(rf"{size}x{size}|[_-]{size}(?!\d)", file_name)}
    size = 384 if is_w24 or 384 in named else 224
    if named == {size} or (is_w24 and not named):
        return size, None
    if not named:
        return size, "the file name does not state a size (224x224 or 384x384)"
    stated = f"the file name states {' and '.join(map(str, sorted(named)))}"
    return size, f"{stated}, but each published CvT-W24 has 384" if is_w24 else stated
