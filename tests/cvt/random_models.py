"""Random weights that give every part of CvT an effect on the outputs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from cvt.architecture import Architecture
from cvt.checkpoints import save_checkpoint
from cvt.modeling import CvtConfig, CvtForImageClassification
from cvt.preprocessing import Preprocessor

Model = TypeVar("Model", bound=nn.Module)

#: Fields of the published configurations that differ from the defaults.
PUBLISHED: dict[str, dict[str, Any]] = {
    "cvt-13": {},
    "cvt-21": {"depth": [1, 4, 16]},
    "cvt-w24": {"num_heads": [3, 12, 16], "embed_dim": [192, 768, 1024], "depth": [2, 2, 20]},
}

#: A model of which a forward pass takes milliseconds.
TINY: dict[str, Any] = {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}


def shallow(folder: Path) -> None:
    """Saves a checkpoint with depths that transformers cannot load."""
    fields = TINY | {"depth": [1, 1, 2], "num_labels": 3}
    model = randomize(CvtForImageClassification(CvtConfig(**fields)))
    save_checkpoint(model, Preprocessor.from_dict({"size": 28}, "test"), folder)


def repeat_stage(index: int, count: int, **fields: Any) -> dict[str, Any]:
    """Returns the fields of an architecture that has copies of one stage of another architecture."""
    values = asdict(Architecture(**fields))
    return {name: [value[index]] * count for name, value in values.items() if isinstance(value, list | tuple)}


#: Four stages. The last one has a class token.
FOUR_STAGES: dict[str, Any] = repeat_stage(1, 4) | {
    "embed_dim": [8, 16, 24, 32],
    "num_heads": [1, 2, 3, 4],
    "depth": [1, 2, 3, 4],
    "cls_token": [False, False, False, True],
}


@torch.no_grad()
def randomize(model: Model, seed: int = 0) -> Model:
    """Fills a model in place with weights that give every part an effect on the output.

    With initial weights, attention would be almost uniform, and batch norm would be the identity. With these
    weights, a branch is about as large as its residual. All values are about 1, so that rounding of float32
    stays below the tolerance of the tests.
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
