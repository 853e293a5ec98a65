"""What can run a model, in which numbers, and where: the names that configurations and commands have.

Without torch, which takes seconds to import.
"""

from __future__ import annotations

from typing import Literal, get_args

Device = Literal["auto", "cpu", "cuda"]

#: PyTorch as it is, compiled, or OpenVINO, on CPUs.
Runtime = Literal["torch", "compile", "openvino"]

#: Numbers that a model computes in.
Precision = Literal["fp32", "bf16", "fp16"]


DEVICES: tuple[Device, ...] = get_args(Device)

RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)

#: By precision, what PyTorch calls it.
DTYPES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


NO_OPENVINO = "openvino is not installed: pip install 'cvt-label[openvino]'"


def precisions_of(runtime: str) -> tuple[Precision, ...]:
    """What a runtime can compute in; of OpenVINO's, bf16 only where the CPU has instructions for it."""
    return tuple(name for name in DTYPES if (runtime, name) != ("openvino", "fp16"))


def resolve_precision(precision: str, device: str) -> str:
    """What `precision` means on a device, "cpu" or "cuda".

    Raises:
        ValueError: it means nothing.
    """
    if precision == "auto":
        return "bf16" if device == "cuda" else "fp32"
    if precision not in DTYPES:
        raise ValueError(f"precision must be one of auto, {', '.join(DTYPES)}, not {precision!r}")
    return precision
