"""Tests of multiply-accumulates against arXiv 2103.15808 and Microsoft's model zoo."""

from __future__ import annotations

from typing import Any

import pytest

from cvt.configuration import CvtConfig
from cvt.counting import count_macs
from cvt.presets import preset_config
from tests.cvt.random_models import TINY


@pytest.mark.parametrize(
    ("name", "size", "exact", "published"),
    [
        ("cvt-13", 224, 4.566, 4.5),
        ("cvt-21", 224, 7.178, 7.1),
        ("cvt-13", 384, 16.269, 16.3),
        ("cvt-21", 384, 24.849, 24.9),
        ("cvt-w24", 384, 194.222, 193.2),
    ],
)
def test_macs_equal_the_definition_and_are_close_to_published_values(
    name: str, size: int, exact: float, published: float
) -> None:
    config = preset_config(name, num_labels=1000)
    macs = count_macs(config, size, size)
    assert macs == expected_macs(config, size)
    assert round(macs / 1e9, 3) == exact
    assert macs / 1e9 == pytest.approx(published, rel=0.015)


@pytest.mark.parametrize("fields", [TINY, TINY | {"mlp_ratio": [2.0, 3.0, 1.0]}], ids=["tiny", "mlp_ratio"])
def test_macs_depend_on_the_configuration(fields: dict[str, Any]) -> None:
    config = CvtConfig(**fields, num_labels=7)
    assert count_macs(config, 64, 64) == expected_macs(config, 64)
    assert count_macs(config, 64, 128) == count_macs(config, 128, 64) > 2 * count_macs(config, 64, 64)


def expected_macs(config: CvtConfig, size: int) -> int:
    """Computes the MACs as in Microsoft's code (`Attention.compute_macs`, without biases)."""
    total, channels, side = config.embed_dim[-1] * config.num_labels, 3, size
    for i, width in enumerate(config.embed_dim):
        side //= config.patch_stride[i]
        tokens, fewer = side**2, (side // 2) ** 2  # queries; keys and values
        total += config.patch_sizes[i] ** 2 * channels * width * tokens
        convolutions = 9 * width * (tokens + 2 * fewer)
        tokens, fewer = tokens + config.cls_token[i], fewer + config.cls_token[i]
        products = 2 * tokens * fewer * width
        projections = width**2 * (2 * tokens + 2 * fewer)
        mlp = 2 * width * int(width * config.mlp_ratio[i]) * tokens
        total += config.depth[i] * (convolutions + products + projections + mlp)
        channels = width
    return total
