"""Tests of the network for inference."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.cvt.inference.small import (
    IMAGES,
    assert_equals_model,
    make_engine,
    make_model,
    model_outputs,
    network,
)


class MicrosoftQuickGELU(nn.Module):
    """The activation in Microsoft's lib/models/cls_cvt.py."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


def test_network_packed_for_onednn_gives_the_same_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    packed, plain = network(model), network(model)
    packed.pack()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain.pack()
    linear = [sum(isinstance(m, nn.Linear) for m in each.model.cvt.modules()) for each in (packed, plain)]
    assert linear[0] == 0 < linear[1]
    with torch.inference_mode():
        assert_close(plain(torch.tensor(IMAGES)), packed(torch.tensor(IMAGES)), atol=1e-5, rtol=1e-5)


def test_quick_gelu_equals_microsofts_formula_in_model_and_engine() -> None:
    model, theirs = make_model(hidden_act="quick_gelu"), make_model()
    gelu, _ = model_outputs(theirs)
    for layer in (module for module in theirs.modules() if hasattr(module, "intermediate")):
        layer.intermediate.activation = MicrosoftQuickGELU()
    logits, expected = model_outputs(model)[0], model_outputs(theirs)[0]
    np.testing.assert_allclose(logits, expected, atol=1e-6, rtol=0)
    assert abs(logits - gelu).max() > 1e-3
    for precision, tolerance in {"fp32": 1e-4, "bf16": 0.1}.items():
        assert_equals_model(make_engine(model, precision=precision), theirs, tolerance)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_network_compiles_to_one_graph_with_the_same_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but without CUDA graphs."""
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no pool of processes
    model = make_model()
    compiled = torch.compile(network(model), dynamic=False, fullgraph=True)
    with torch.inference_mode():
        logits, embeddings = compiled(torch.tensor(IMAGES))
    for found, expected in zip((logits, embeddings), model_outputs(model), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
