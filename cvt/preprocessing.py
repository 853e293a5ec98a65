"""Resizes and crops images as specified by a checkpoint's preprocessor_config.json.

The result is uint8 and equals that of transformers' ConvNextImageProcessor, the processor of CvT, except for
rounding: few values differ, by at most two gray levels. The pipeline decodes image files. The engine
normalizes pixels.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from cvt.errors import CheckpointError, checkpoint_errors, describe_validation_error, read_text_bytes

# Not an optional package: pixels, and so labels, must not depend on what is installed. pyproject.toml has the
# same condition.
if _HAS_SIMD := platform.machine() != "aarch64":  # Linux on ARM, for which there is no wheel
    import cykooz_resizer

FILE_NAME = "preprocessor_config.json"

# At this size and above, ConvNextImageProcessor squashes the whole image into a square, without a crop.
SQUASH_FROM = 384

# All names of this processor in transformers' files. For a CvT without a name, transformers uses it too.
_Type = Literal[
    "ConvNextImageProcessor",
    "ConvNextImageProcessorFast",
    "ConvNextImageProcessorPil",
    "ConvNextFeatureExtractor",
]

# Excludes nearest and box: with these filters, rounding decides which pixels count. Resizing a part of an
# image then differs from cropping the resized image.
SMOOTH_FILTERS = frozenset(Image.Resampling) - {Image.Resampling.NEAREST, Image.Resampling.BOX}

# Filters that PyTorch supports, with PyTorch's names.
TORCH_FILTERS: dict[int, str] = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}

# Pillow's filters in cykooz-resizer, which uses SIMD. Its weights have 16 bits instead of 22, so one value in
# 300 differs from Pillow's, by one or two gray levels.
_SIMD_FILTERS: dict[int, Any] = {}
if _HAS_SIMD:
    _convolution, _filters = cykooz_resizer.ResizeAlg.convolution, cykooz_resizer.FilterType
    _SIMD_FILTERS = {
        Image.Resampling.BILINEAR: _convolution(_filters.bilinear),
        Image.Resampling.BICUBIC: _convolution(_filters.catmull_rom),
        Image.Resampling.LANCZOS: _convolution(_filters.lanczos3),
    }

# Radius of Pillow's widest filter, in pixels of the smaller image.
FILTER_REACH = 5

# Left, top, right and bottom, in pixels of the source image.
Box = tuple[float, float, float, float]


def _shortest_edge(size: Any) -> Any:
    """Returns the size in pixels. Files may have {"shortest_edge": pixels} instead of a number."""
    return size["shortest_edge"] if isinstance(size, Mapping) and size.keys() == {"shortest_edge"} else size


def _per_channel(value: Any) -> Any:
    """Returns one value per channel. Files may have a single number for all channels."""
    return list(value) if isinstance(value, list | tuple) else [value] * 3


#: Limits on the memory for one image: 12 MiB after the crop, and on a GPU 100 times as much before the crop.
_MAX_SIZE, _MIN_CROP_PCT = 2048, 0.1

_Positive = Annotated[float, Field(gt=0)]
_CHANNELS = (Field(min_length=3, max_length=3), BeforeValidator(_per_channel))


class _File(BaseModel):
    """The fields that ConvNextImageProcessor reads from preprocessor_config.json, with its defaults."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    image_processor_type: _Type | None = None
    feature_extractor_type: _Type | None = None
    do_resize: Literal[True] = True
    size: Annotated[int, Field(gt=0, le=_MAX_SIZE), BeforeValidator(_shortest_edge)] = 384
    default_to_square: Literal[False] | None = None
    do_center_crop: Literal[False] | None = None
    crop_pct: Annotated[float, Field(ge=_MIN_CROP_PCT, le=1)] = 224 / 256
    resample: int = Image.Resampling.BICUBIC.value
    do_rescale: bool = True
    rescale_factor: _Positive = 1 / 255
    do_normalize: bool = True
    image_mean: Annotated[list[float], *_CHANNELS] = [0.5] * 3
    image_std: Annotated[list[_Positive], *_CHANNELS] = [0.5] * 3

    @field_validator("resample")
    @classmethod
    def _check_filter(cls, value: int) -> int:
        if value not in SMOOTH_FILTERS:
            raise ValueError(f"must be one of {sorted(map(int, SMOOTH_FILTERS))}, Pillow's smooth filters")
        return value


@dataclass(frozen=True)
class Preprocessor:
    """Resizing, cropping and normalization of a checkpoint.

    Attributes:
        size: height and width of the result in pixels.
        crop_pct: fraction of the shortest side of the resized image that the crop keeps. Sizes of 384 and
            above have no crop.
        resample: interpolation filter, a value of `PIL.Image.Resampling`.
        mean: mean of the rescaled values per channel. The engine subtracts the mean.
        std: standard deviation of the rescaled values per channel. The engine divides by it.
        rescale_factor: factor from gray levels to rescaled values. The engine multiplies by it.
    """

    size: int
    crop_pct: float
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str) -> Preprocessor:
        """Creates a preprocessor from the content of a preprocessor_config.json.

        Missing fields have the defaults of ConvNextImageProcessor. Unknown fields are ignored.

        Raises:
            CheckpointError: a field is invalid or not supported. The message names `source` and the field.
        """
        try:
            file = _File.model_validate(config)
        except ValidationError as error:
            raise CheckpointError(f"{source}: {describe_validation_error(error)}") from None
        return cls(
            size=file.size,
            crop_pct=file.crop_pct,
            resample=file.resample,
            mean=tuple(file.image_mean) if file.do_normalize else (0.0,) * 3,
            std=tuple(file.image_std) if file.do_normalize else (1.0,) * 3,
            rescale_factor=file.rescale_factor if file.do_rescale else 1.0,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Preprocessor:
        """Reads the preprocessor_config.json in the folder of a checkpoint, as `from_dict` does."""
        file = folder / FILE_NAME
        with checkpoint_errors(f"{file}: cannot be read as JSON"):
            config = json.loads(read_text_bytes(file))
        if not isinstance(config, dict):
            raise CheckpointError(f"{file}: not a JSON object")
        return cls.from_dict(config, str(file))

    @classmethod
    def published(cls, size: int = 224) -> Preprocessor:
        """Returns the preprocessing of the published checkpoints, for an image size of `size` pixels."""
        return cls(
            size=size,
            crop_pct=0.875,
            resample=int(Image.Resampling.BICUBIC),
            mean=(0.485, 0.456, 0.406),  # ImageNet statistics
            std=(0.229, 0.224, 0.225),
            rescale_factor=1 / 255,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of a preprocessor_config.json, for `from_dict` and transformers."""
        return {
            "image_processor_type": "ConvNextImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": self.size},
            "crop_pct": self.crop_pct,
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": self.rescale_factor,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def __call__(
        self, image: Image.Image, source: tuple[int, int] | None = None, part: Box | None = None
    ) -> np.ndarray:
        """Resizes and crops an RGB image to a writable uint8 array (size, size, 3).

        Args:
            image: image in mode RGB.
            source: width and height of the original image, if `image` is a reduced copy.
            part: box in `image` that shows the original image. Default: the whole image.
        """
        if image.mode != "RGB":
            raise ValueError(f"the image must be in mode RGB, not {image.mode}")
        new_size = (self.size, self.size)
        box, resized = part or (0, 0, *image.size), new_size
        if self.size < SQUASH_FROM:
            resized = self.resized_size(*(source or image.size))
            box = self._kept_box(box, resized)
        if image.size == new_size and box == (0, 0, *new_size):
            return np.array(image)
        height_first = _height_first(image.size, resized)
        if self.resample in _SIMD_FILTERS:
            return np.array(self._resize_with_simd(image, box, height_first))
        if _height_first(image.size, new_size) and not height_first:
            return np.array(self._resize_width_first(image, box))
        return np.array(image.resize(new_size, self.resample, box=box))

    def _resize_with_simd(self, image: Image.Image, box: Box, height_first: bool) -> Image.Image:
        """Resizes like `image.resize` with this box, in two passes in the given order."""
        # With single precision, as in Pillow, the differences and sums of coordinates are exact.
        left, top, right, bottom = np.array(box, np.float32).tolist()
        if height_first:
            first, last = _reached(left, right, self.size, image.width)
            image = self._convolve(image, (last - first, self.size), (first, top, last, bottom))
            return self._convolve(image, (self.size, self.size), (left - first, 0, right - first, self.size))
        first, last = _reached(top, bottom, self.size, image.height)
        image = self._convolve(image, (self.size, last - first), (left, first, right, last))
        return self._convolve(image, (self.size, self.size), (0, top - first, self.size, bottom - first))

    def _convolve(self, image: Image.Image, size: tuple[int, int], box: Box) -> Image.Image:
        left, top, right, bottom = box
        crop = cykooz_resizer.CropBox(left, top, right - left, bottom - top)
        options = cykooz_resizer.ResizeOptions(_SIMD_FILTERS[self.resample], crop_box=crop)
        resized = Image.new("RGB", size)
        cykooz_resizer.Resizer().resize_pil(image, resized, options)
        return resized

    def _resize_width_first(self, image: Image.Image, box: Box) -> Image.Image:
        """Resizes like `image.resize` with this box, but resizes the width first."""
        left, top, right, bottom = box
        first, last = _reached(top, bottom, self.size, image.height)
        rows = image.crop((0, first, image.width, last))
        # Pillow skips the pass of an axis if neither the size nor the box changes it.
        narrow = rows.resize((self.size, rows.height), self.resample, box=(left, 0, right, rows.height))
        return narrow.resize(
            (self.size, self.size), self.resample, box=(0, top - first, self.size, bottom - first)
        )

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns width and height before the crop, as transformers' get_resize_output_image_size does."""
        if self.size >= SQUASH_FROM:
            return self.size, self.size
        shortest = int(self.size / self.crop_pct)
        if width <= height:
            return shortest, int(shortest * height / width)
        return int(shortest * width / height), shortest

    def torch_filter(self) -> str:
        """Returns PyTorch's name of the filter; raises `ValueError` if PyTorch does not support it."""
        if self.resample not in TORCH_FILTERS:
            supported = " and ".join(f"{int(number)} ({name})" for number, name in TORCH_FILTERS.items())
            raise ValueError(
                f"preprocessor_config.json: resample: {self.resample} is not supported on a GPU,"
                f" only {supported}"
            )
        return TORCH_FILTERS[self.resample]

    def crop_corner(self, width: int, height: int) -> tuple[int, int]:
        """Returns left and top of the crop in the resized image, rounded as in transformers' center_crop."""
        return (width - self.size) // 2, (height - self.size) // 2

    def _kept_box(self, source: Box, resized: tuple[int, int]) -> Box:
        """Returns the part of the source image that the crop keeps."""
        left, top = self.crop_corner(*resized)
        width, height = source[2] - source[0], source[3] - source[1]
        # Multiplies before dividing: a crop that ends at the edge of the image then ends exactly at its edge.
        return (
            source[0] + left * width / resized[0],
            source[1] + top * height / resized[1],
            source[0] + (left + self.size) * width / resized[0],
            source[1] + (top + self.size) * height / resized[1],
        )


def _reached(start: float, end: float, resized: int, length: int) -> tuple[int, int]:
    """Returns the range of the pixels along an axis that affect a resized part of the axis."""
    reach = math.ceil(FILTER_REACH * max(1.0, (end - start) / resized))
    return max(0, math.floor(start) - reach), min(length, math.ceil(end) + reach)


def _height_first(source: tuple[int, int], resized: tuple[int, int]) -> bool:
    """Returns whether Pillow 13 and later resizes the height before the width.

    Each pass rounds to 8 bits, so the order changes the pixels, by about 0.3 gray levels on average. The
    order must be the same as for the whole image without a crop.
    """
    width_loss, height_loss = source[0] - resized[0], source[1] - resized[1]
    return height_loss > 0 and height_loss > 2 * width_loss
