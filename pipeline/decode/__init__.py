"""From encoded images to pixels, on the CPU or on the classifier's GPU.

`decode.gpu` needs PyTorch and is imported by its module name. Resizing rules belong to `cvt.preprocessing`.
"""

from pipeline.decode.cpu import decode, decode_chunk
