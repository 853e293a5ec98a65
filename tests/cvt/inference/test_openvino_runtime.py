"""Tests of inference in OpenVINO."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

from cvt.inference.openvino_runtime import import_openvino
from tests.cvt.inference.small import (
    IMAGES,
    assert_equals_model,
    make_engine,
    make_model,
)

pytestmark = pytest.mark.slow

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="cvt-label[openvino] is not installed"
)


@needs_openvino
@pytest.mark.parametrize("method", ["dw_bn", "linear"])
def test_openvino_engine_equals_the_model(method: str) -> None:
    model = make_model(qkv_projection_method=[method] * 3)
    engine = make_engine(model, runtime="openvino", batch_size=5)  # 7 images: the last batch is padded
    assert_equals_model(engine, model)
    assert engine(IMAGES[:0]).logits.shape == (0, 5)
    with pytest.raises(ValueError, match="runtime 'openvino' does not support precision 'fp16' on this CPU"):
        make_engine(model, runtime="openvino", precision="fp16")
    with pytest.raises(ValueError, match="does not support qkv_projection_method 'avg'"):
        make_engine(make_model(qkv_projection_method=["avg"] * 3), runtime="openvino")
    assert "openvino_telemetry" not in sys.modules
    assert "openvino.tools.ovc.telemetry_stub" in sys.modules


@needs_openvino
def test_openvino_in_half_precision_is_close_to_the_model() -> None:
    if "BF16" not in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no instructions for bfloat16")
    model = make_model(num_labels=1000)
    engine = make_engine(model, runtime="openvino", precision="bf16")
    assert_equals_model(engine, model, tolerance=0.2)
    assert all(len(np.unique(row)) > 990 for row in engine(IMAGES).logits)


def test_missing_openvino_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"pip install 'cvt-label\[openvino\]'"):
        make_engine(runtime="openvino")
