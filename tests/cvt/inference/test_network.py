"""Tests of the network for inference."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.cvt.inference.small import (
    IMAGES,
    make_model,
    network,
)


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
