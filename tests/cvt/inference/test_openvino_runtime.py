"""Tests of inference in OpenVINO."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

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
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cls_token": [False] * 3},
        {"cls_token": [False, True, True], "embed_dim": [16, 48, 48], "num_heads": [2, 2, 4]},
        {"qkv_projection_method": ["linear"] * 3, "hidden_act": "quick_gelu"},
        {"qkv_projection_method": ["avg"] * 3, "qkv_bias": [False] * 3},
        {"qkv_projection_method": ["avg"] * 3, "kernel_qkv": [2, 3, 1], "padding_kv": [1, 0, 0]},
        {
            "qkv_projection_method": ["avg", "dw_bn", "linear"],
            "patch_sizes": [5, 2, 3],
            "stride_kv": [3, 1, 2],
        },
    ],
    ids=str,
)
def test_openvino_engine_equals_the_model(fields: dict[str, Any]) -> None:
    model = make_model(**fields)
    engine = make_engine(model, runtime="openvino", batch_size=5)  # 7 images: the last batch is padded
    assert_equals_model(engine, model)
    assert engine(IMAGES[:0]).logits.shape == (0, 5)


@needs_openvino
def test_openvino_without_support_for_a_precision_is_an_error() -> None:
    with pytest.raises(ValueError, match="runtime 'openvino' does not support precision 'fp16' on this CPU"):
        make_engine(runtime="openvino", precision="fp16")


@needs_openvino
def test_openvino_converts_a_network_without_telemetry() -> None:
    make_engine(runtime="openvino")
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


@needs_openvino
def test_threads_are_not_pinned_to_the_cores_of_other_processes() -> None:
    runtime: Any = make_engine(runtime="openvino")._runtime
    compiled = runtime._requests.get().get_compiled_model()
    assert compiled.get_property("ENABLE_CPU_PINNING") is False


@needs_openvino
def test_signal_arrives_after_a_thread_deleted_the_engine() -> None:
    program = """
import signal, threading
from tests.cvt.inference.small import make_engine

signal.signal(signal.SIGUSR1, lambda number, frame: print("handled"))
engines = [make_engine(runtime="openvino")]
deleting = threading.Thread(target=engines.clear)
deleting.start()
deleting.join()
signal.raise_signal(signal.SIGUSR1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_missing_openvino_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"pip install 'cvt-label\[openvino\]'"):
        make_engine(runtime="openvino")
