"""Resizes and crops images on a torch device, like `cvt.preprocessing` with Pillow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvt.preprocessing import Preprocessor


class DevicePreprocessor:
    """Resizes and crops an image on its device.

    Pixels differ from Pillow's by a fraction of a gray level, because Pillow rounds to 8 bits after each
    axis and this class rounds once.

    Raises:
        ValueError: PyTorch does not support the filter.
    """

    def __init__(self, preprocessor: Preprocessor) -> None:
        self._preprocessor = preprocessor
        self._mode = preprocessor.torch_filter()

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """Converts an RGB image, uint8 (3, height, width), to uint8 (size, size, 3) on the same device."""
        size = self._preprocessor.size
        width, height = self._preprocessor.resized_size(image.shape[2], image.shape[1])
        left, top = self._preprocessor.crop_corner(width, height)
        pixels = image[None].float()
        if (height, width) != image.shape[1:]:
            pixels = nn.functional.interpolate(
                pixels, size=(height, width), mode=self._mode, align_corners=False, antialias=True
            )
        kept = pixels[0, :, top : top + size, left : left + size].permute(1, 2, 0)
        # Rounds half up, as Pillow does. Clamps, because bicubic interpolation overshoots.
        return (kept + 0.5).clamp_(0, 255).to(torch.uint8)
