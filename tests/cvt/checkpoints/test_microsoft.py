"""Tests of the names and variants of Microsoft's checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cvt.architecture import PRESETS, Architecture
from cvt.checkpoints.microsoft import image_size, infer_architecture, microsoft_key, rename_weights
from cvt.errors import CheckpointError
from cvt.modeling import CvtForImageClassification, preset_config
from tests.cvt.microsoft_names import as_microsoft, microsoft_names
from tests.cvt.random_models import TINY


def test_names_equal_microsofts_modules() -> None:
    names = microsoft_names(TINY["depth"])
    assert {theirs: microsoft_key(theirs) for theirs in names.values()} == {t: o for o, t in names.items()}
    tensors = {key: torch.tensor(i) for i, key in enumerate(names)}
    back = rename_weights(tensors, names.values())
    assert {key: int(tensor) for key, tensor in back.items()} == {t: i for i, t in enumerate(names.values())}


def test_transformers_and_unknown_names_stay_unchanged() -> None:
    keys = list(microsoft_names([1, 1, 1]).values())
    weights = dict.fromkeys(keys, torch.ones(1)) | {"stage0.pos_embed": torch.ones(1)}
    assert rename_weights(weights, keys).keys() == weights.keys()


def published(name: str, classes: int = 5, **fields: Any) -> dict[str, Tensor]:
    """Returns weights on the meta device of a variant, with Microsoft's names."""
    config = preset_config(name, num_labels=classes, **fields)
    with torch.device("meta"):
        return as_microsoft(CvtForImageClassification(config).state_dict(), config.depth)


@pytest.mark.parametrize("name", PRESETS)
def test_variant_is_inferred_from_weight_shapes(name: str) -> None:
    architecture = infer_architecture(published(name))
    assert architecture == Architecture.from_dict(vars(preset_config(name)))


def test_unknown_weight_shapes_fail_with_the_difference() -> None:
    def cause(weights: dict[str, Tensor]) -> str:
        with pytest.raises(CheckpointError) as caught:
            infer_architecture(weights)
        return str(caught.value)

    deeper = cause(published("cvt-13", depth=[1, 2, 11]))
    assert "has embed_dim [64, 192, 384] and depth [1, 2, 11]" in deeper
    wider = cause(published("cvt-13", embed_dim=[64, 192, 768]))
    assert "has embed_dim [64, 192, 768] and depth [1, 2, 10]" in wider
    headless = {key: tensor for key, tensor in published("cvt-13").items() if not key.startswith("head.")}
    assert "no classifier" in cause(headless)
    assert "stage0.patch_embed.proj.weight is missing" in cause({"conv1.weight": torch.ones(1)})


NONE_STATED = "the file name does not state a size (224x224 or 384x384)"
W24 = "but each published CvT-W24 has 384"


@pytest.mark.parametrize(
    ("name", "variant", "size", "cause"),
    [
        ("CvT-13-224x224-IN-1k.pth", "cvt-13", 224, None),
        ("CvT-13-384x384-IN-22k.pth", "cvt-13", 384, None),
        ("mine_384x384.pth", "cvt-21", 384, None),
        ("384x384.pth", "cvt-21", 384, None),
        ("cvt13_384_best.pth", "cvt-13", 384, None),
        ("cvt-21-384-22k.pt", "cvt-21", 384, None),
        ("cvt_224.pth", "cvt-13", 224, None),
        ("epoch_3840.pth", "cvt-13", 224, NONE_STATED),
        ("checkpoint.pth", "cvt-13", 224, NONE_STATED),
        ("from-224-to-384.pth", "cvt-13", 384, "the file name states 224 and 384"),
        ("CvT-w24-384x384-IN-22k.pth", "cvt-w24", 384, None),
        ("checkpoint.pth", "cvt-w24", 384, None),
        ("cvt-w24-224x224.pth", "cvt-w24", 384, f"the file name states 224, {W24}"),
        ("cvt-w24-224x224-384x384.pth", "cvt-w24", 384, f"the file name states 224 and 384, {W24}"),
    ],
)
def test_image_size_is_inferred_from_file_name_and_variant(
    name: str, variant: str, size: int, cause: str | None
) -> None:
    assert image_size(name, Architecture(**PRESETS[variant])) == (size, cause)
