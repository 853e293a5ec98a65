"""Models with random weights that leave no part of CvT without effect on the outputs."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)

#: What differs from the defaults in the configurations of the published checkpoints.
PUBLISHED: dict[str, dict[str, Any]] = {
    "cvt-13": {},
    "cvt-21": {"depth": [1, 4, 16]},
    "cvt-w24": {"num_heads": [3, 12, 16], "embed_dim": [192, 768, 1024], "depth": [2, 2, 20]},
}

#: A model of which a forward pass takes milliseconds.
TINY: dict[str, Any] = {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}


@torch.no_grad()
def randomize(model: Model, seed: int = 0) -> Model:
    """Fills a model, in place, such that each part of it shows in the output.

    With its initial weights, attention would be almost uniform, and batch norm the identity. Here a
    branch weighs about as much as what it is added to, and all of it is about 1, lest float32 itself
    round by more than what tests tolerate.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            deviation = 0.5 * module.weight[0].numel() ** -0.5
            module.weight.normal_(0, deviation, generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.1, generator=generator)
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            scale = 0.25 if name.endswith("embeddings.normalization") else 1.0
            module.weight.uniform_(0.5 * scale, 1.5 * scale, generator=generator)
            module.bias.normal_(0, 0.1, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.3, 2, generator=generator)
            module.num_batches_tracked.zero_()
        if isinstance(getattr(module, "cls_token", None), nn.Parameter):
            module.cls_token.normal_(0, 1, generator=generator)
    return model.eval()
