"""Fast inference: the engine and its runtimes, which are PyTorch on a CPU or GPU, and OpenVINO."""

from cvt.inference.engine import Engine
from cvt.inference.network import EngineOutput
