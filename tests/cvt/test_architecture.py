"""Tests of multiply-accumulates against PyTorch's counter and arXiv 2103.15808."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cvt.architecture import PRESETS, Architecture, count_macs
from cvt.network import CvtClassifier
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
def test_macs_are_close_to_published_values(name: str, size: int, exact: float, published: float) -> None:
    macs = count_macs(Architecture(**PRESETS[name]), 1000, size)
    assert round(macs / 1e9, 3) == exact
    assert macs / 1e9 == pytest.approx(published, rel=0.015)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mlp_ratio": [2.0, 3.0, 1.0]},
        {"qkv_projection_method": ["avg", "linear", "dw_bn"], "cls_token": [False, False, False]},
        {"qkv_projection_method": ["avg"] * 3, "stride_kv": [3, 2, 1], "kernel_qkv": [2, 3, 2]},
        {"kernel_qkv": [5, 3, 1], "padding_q": [2, 1, 0], "padding_kv": [2, 0, 1]},
    ],
    ids=["tiny", "mlp_ratio", "methods", "pooling", "kernels"],
)
@pytest.mark.parametrize("size", [64, 70])
def test_macs_equal_those_that_pytorch_counts(fields: dict[str, Any], size: int) -> None:
    config = Architecture(**TINY | fields)
    with torch.device("meta"), torch.no_grad():
        network = CvtClassifier(config, 7).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, size, size))
    assert count_macs(config, 7, size) == counter.get_total_flops() / 2
