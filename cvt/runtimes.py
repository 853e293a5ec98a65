"""Names of devices, runtimes and precisions, for configurations and commands.

Imports no torch, which takes seconds.
"""

from __future__ import annotations

from typing import Literal, get_args

Device = Literal["auto", "cpu", "cuda"]

#: PyTorch, compiled PyTorch, or OpenVINO, which is for CPUs.
Runtime = Literal["torch", "compile", "openvino"]

#: Number formats that a model computes in.
Precision = Literal["fp32", "bf16", "fp16"]

DEVICES: tuple[Device, ...] = get_args(Device)
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)

#: PyTorch's names of the precisions.
DTYPES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

NO_OPENVINO = "openvino is not installed: pip install 'cvt-label[openvino]'"


def precisions_of(runtime: str) -> tuple[Precision, ...]:
    """The precisions of a runtime. OpenVINO's bf16 needs a CPU with instructions for it."""
    return tuple(name for name in DTYPES if (runtime, name) != ("openvino", "fp16"))


def resolve_precision(precision: str, device: str) -> str:
    """The precision that a setting means on a device, "cpu" or "cuda".

    Raises:
        ValueError: there is no such precision.
    """
    if precision == "auto":
        return "bf16" if device == "cuda" else "fp32"
    if precision not in DTYPES:
        raise ValueError(f"precision must be one of auto, {', '.join(DTYPES)}, not {precision!r}")
    return precision
