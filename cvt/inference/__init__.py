"""The engine that runs the model fast, and its runtimes: PyTorch, CUDA and OpenVINO.

Loading checkpoints does not belong here.
"""

from cvt.inference.engine import Engine
from cvt.inference.runtime import EngineOutput

__all__ = ["Engine", "EngineOutput"]
