"""Names of weights in Microsoft's checkpoints, from the modules in its lib/models/cls_cvt.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

_TENSORS = ("weight", "bias")
_BATCH_NORM = (*_TENSORS, "running_mean", "running_var", "num_batches_tracked")
_WORDS = {"q": "query", "k": "key", "v": "value"}


def microsoft_names(depth: Sequence[int]) -> dict[str, str]:
    """Maps Microsoft's to transformers' names, for a model with these depths and a class token."""
    names = {f"stage{len(depth) - 1}.cls_token": f"cvt.encoder.stages.{len(depth) - 1}.cls_token"}

    def add(microsoft: str, transformers: str, tensors: Sequence[str] = _TENSORS) -> None:
        names.update({f"{microsoft}.{tensor}": f"{transformers}.{tensor}" for tensor in tensors})

    for i, blocks in enumerate(depth):
        ours, theirs = f"stage{i}", f"cvt.encoder.stages.{i}"
        add(f"{ours}.patch_embed.proj", f"{theirs}.embedding.convolution_embeddings.projection")
        add(f"{ours}.patch_embed.norm", f"{theirs}.embedding.convolution_embeddings.normalization")
        for j in range(blocks):
            ours, theirs = f"stage{i}.blocks.{j}", f"cvt.encoder.stages.{i}.layers.{j}"
            add(f"{ours}.norm1", f"{theirs}.layernorm_before")
            add(f"{ours}.norm2", f"{theirs}.layernorm_after")
            add(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense")
            add(f"{ours}.mlp.fc2", f"{theirs}.output.dense")
            add(f"{ours}.attn.proj", f"{theirs}.attention.output.dense")
            for letter, word in _WORDS.items():
                attention = f"{theirs}.attention.attention"
                convolution = f"{attention}.convolution_projection_{word}.convolution_projection"
                add(f"{ours}.attn.proj_{letter}", f"{attention}.projection_{word}")
                add(f"{ours}.attn.conv_proj_{letter}.conv", f"{convolution}.convolution", ["weight"])
                add(f"{ours}.attn.conv_proj_{letter}.bn", f"{convolution}.normalization", _BATCH_NORM)
    add("norm", "layernorm")
    add("head", "classifier")
    return names


def as_microsoft(weights: Mapping[str, Tensor], depth: Sequence[int]) -> dict[str, Tensor]:
    """Converts weights with transformers' names to Microsoft's names."""
    names = microsoft_names(depth)
    assert sorted(names.values()) == sorted(weights)
    return {ours: weights[theirs] for ours, theirs in names.items()}
