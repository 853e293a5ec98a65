"""The engine that runs the model fast, and its runtimes: PyTorch on a CPU or a GPU, OpenVINO.

Loading checkpoints and decoding images do not belong here.
"""

from cvt.inference.engine import Engine
from cvt.inference.network import EngineOutput
