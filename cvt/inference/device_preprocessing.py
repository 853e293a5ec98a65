"""Resizes and crops on a torch device, as `cvt.preprocessing` does with Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from cvt.preprocessing import Preprocessor

#: PyTorch's names of the filters that it has.
MODES = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}


class DevicePreprocessor:
    """Resizes and crops on the device of the images, each image by itself.

    Pixels differ from Pillow's by a fraction of a gray level: Pillow rounds to 8 bits after each axis, and
    this class once.

    Raises:
        ValueError: PyTorch does not have the interpolation.
    """

    def __init__(self, preprocessor: Preprocessor) -> None:
        if preprocessor.resample not in MODES:
            known = " and ".join(f"{int(number)} ({name})" for number, name in MODES.items())
            raise ValueError(
                f"preprocessor_config.json: resample: {preprocessor.resample}, but on a GPU"
                f" images can be resized by {known} only"
            )
        self._preprocessor = preprocessor
        self._mode = MODES[Image.Resampling(preprocessor.resample)]

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """Resizes and crops n images of any sizes.

        Args:
            images: at least one, RGB, uint8 (3, height, width), on one device.
            out: tensor to write the result to.

        Returns:
            uint8 (n, size, size, 3) on the images' device.
        """
        if out is None:
            size = self._preprocessor.size
            out = torch.empty((len(images), size, size, 3), dtype=torch.uint8, device=images[0].device)
        for row, image in zip(out, images, strict=True):
            row.copy_(self._resized(image).permute(1, 2, 0))
        return out

    def _resized(self, image: Tensor) -> Tensor:
        """One image, (3, height, width), to float32 (3, size, size), to be truncated to integers."""
        size = self._preprocessor.size
        width, height = self._preprocessor.resized_size(image.shape[2], image.shape[1])
        left, top = self._preprocessor.crop_corner(width, height)
        pixels = image[None].float()
        if (height, width) != image.shape[1:]:
            pixels = nn.functional.interpolate(
                pixels, size=(height, width), mode=self._mode, align_corners=False, antialias=True
            )
        kept = pixels[0, :, top : top + size, left : left + size]
        # Half up, as Pillow; bicubic interpolation overshoots.
        return (kept + 0.5).clamp_(0, 255)
