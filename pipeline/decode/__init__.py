"""Decodes images to pixels, on the CPU or on the GPU of a classifier.

`decode.gpu` needs PyTorch and is imported by its module name. `cvt.preprocessing` resizes and crops.
"""

from pipeline.decode import isolated  # sets the decoders in child processes
from pipeline.decode.cpu import CHUNK_TIMEOUTS, DecodeOptions, decode, decode_chunk, hide_pillow_warnings
from pipeline.decode.row_images import open_image
