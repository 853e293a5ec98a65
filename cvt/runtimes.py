"""Names of devices, runtimes and precisions, for configurations and commands; the fastest runtime.

Imports neither torch, which takes seconds, nor openvino.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, get_args

Device = Literal["auto", "cpu", "cuda"]

#: PyTorch, compiled PyTorch or OpenVINO.
Runtime = Literal["torch", "compile", "openvino"]

#: Floating-point formats of the computation.
Precision = Literal["fp32", "bf16", "fp16"]

#: The device of the runtimes that run on one only. On CPUs, compiled PyTorch was slower than PyTorch.
RUNTIME_DEVICES: dict[str, str] = {"compile": "cuda", "openvino": "cpu"}

DEVICES: tuple[Device, ...] = get_args(Device)
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)

#: PyTorch's name of each precision.
DTYPES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

OPENVINO_MISSING = "openvino is not installed: pip install 'cvt-label[openvino]'"


def supported_precisions(runtime: str) -> tuple[Precision, ...]:
    """Returns the precisions that a runtime supports. bf16 in OpenVINO needs a CPU with bf16 instructions."""
    return tuple(name for name in DTYPES if (runtime, name) != ("openvino", "fp16"))


def openvino_is_installed() -> bool:
    """Returns whether openvino is installed in this environment, without importing it."""
    return importlib.util.find_spec("openvino") is not None


def fastest_runtime(device: str, precision: str) -> Runtime:
    """Returns the fastest installed runtime: on a CPU OpenVINO, else PyTorch.

    The size of the model has no effect: OpenVINO was faster for all measured models on Intel CPUs. At the
    start, it converts the network in less than a second. Compiled PyTorch takes a minute to start.
    """
    supported = device == "cpu" and precision in supported_precisions("openvino")
    return "openvino" if supported and openvino_is_installed() else "torch"


def resolve_precision(precision: str, device: str) -> str:
    """Resolves "auto" to the precision for a device: bf16 on "cuda", fp32 on "cpu".

    Raises:
        ValueError: the precision is unknown.
    """
    if precision == "auto":
        return "bf16" if device == "cuda" else "fp32"
    if precision not in DTYPES:
        raise ValueError(f"precision must be one of auto, {', '.join(DTYPES)}, not {precision!r}")
    return precision
