"""The pixels that a checkpoint's preprocessor_config.json asks for.

Resizes and crops to uint8 as transformers' ConvNextImageProcessor, which is CvT's. Decoding files belongs to
the pipeline, normalization to the engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from cvt.errors import CheckpointError, checkpoint_errors, described

FILE_NAME = "preprocessor_config.json"

# From this size on, ConvNextImageProcessor squashes the whole image into a square.
SQUASH_FROM = 384

# All names under which transformers has written this processor. Without one, it takes this one for CvT.
_Type = Literal[
    "ConvNextImageProcessor",
    "ConvNextImageProcessorFast",
    "ConvNextImageProcessorPil",
    "ConvNextFeatureExtractor",
]

# With nearest and box, rounding errors decide which pixels count: resizing a part of an image differs from
# taking a part of the resized image.
SMOOTH_FILTERS = frozenset(Image.Resampling) - {Image.Resampling.NEAREST, Image.Resampling.BOX}

# How far the widest of Pillow's filters reaches, in pixels of the smaller image.
FILTER_REACH = 5

# Left, top, right and bottom, in pixels of the source.
Box = tuple[float, float, float, float]


def _shortest_edge(size: Any) -> Any:
    """A size in pixels, which files also write as {"shortest_edge": pixels}."""
    return size["shortest_edge"] if isinstance(size, Mapping) and size.keys() == {"shortest_edge"} else size


def _three(value: Any) -> Any:
    """The values of red, green and blue, for which files may have one."""
    return list(value) if isinstance(value, list | tuple) else [value] * 3


_Positive = Annotated[float, Field(gt=0)]
_CHANNELS = (Field(min_length=3, max_length=3), BeforeValidator(_three))


class _File(BaseModel):
    """The fields of a preprocessor_config.json that ConvNextImageProcessor uses, and its defaults."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    image_processor_type: _Type | None = None
    feature_extractor_type: _Type | None = None
    do_resize: Literal[True] = True
    size: Annotated[int, Field(gt=0), BeforeValidator(_shortest_edge)] = 384
    default_to_square: Literal[False] | None = None
    do_center_crop: Literal[False] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 224 / 256
    resample: int = Image.Resampling.BICUBIC.value
    do_rescale: bool = True
    rescale_factor: _Positive = 1 / 255
    do_normalize: bool = True
    image_mean: Annotated[list[float], *_CHANNELS] = [0.5] * 3
    image_std: Annotated[list[_Positive], *_CHANNELS] = [0.5] * 3

    @field_validator("resample")
    @classmethod
    def _is_smooth(cls, value: int) -> int:
        if value not in SMOOTH_FILTERS:
            raise ValueError(f"must be one of {sorted(map(int, SMOOTH_FILTERS))}, Pillow's smooth filters")
        return value


@dataclass(frozen=True)
class Preprocessor:
    """The resizing and cropping that a checkpoint was trained with.

    Attributes:
        size: height and width of the result in pixels.
        crop_pct: below 384, the part of the resized image's shortest side that the crop keeps.
        resample: Pillow's number of the interpolation (`PIL.Image.Resampling`).
        mean: per channel, of the rescaled values; for the engine.
        std: per channel, of the rescaled values; for the engine.
        rescale_factor: multiplies gray levels before normalization; for the engine.
    """

    size: int
    crop_pct: float
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str) -> Preprocessor:
        """Reads the content of a preprocessor_config.json.

        Absent fields have ConvNextImageProcessor's defaults. Fields that it does not use are ignored.

        Args:
            config: the parsed file.
            source: what errors call the file.

        Raises:
            CheckpointError: a field is malformed or not supported; names source and field.
        """
        try:
            file = _File.model_validate(config)
        except ValidationError as error:
            raise CheckpointError(f"{source}: {described(error)}") from None
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
        """Reads the preprocessor_config.json of a checkpoint's folder.

        Raises:
            CheckpointError: there is no such file, or see `from_dict`; names the file.
        """
        file = folder / FILE_NAME
        with checkpoint_errors(f"{file}: cannot be read as JSON"):
            config = json.loads(file.read_bytes())
        if not isinstance(config, dict):
            raise CheckpointError(f"{file}: not a JSON object")
        return cls.from_dict(config, str(file))

    def to_dict(self) -> dict[str, Any]:
        """The content of a preprocessor_config.json, for `from_dict` and transformers."""
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
        self,
        image: Image.Image,
        source: tuple[int, int] | None = None,
        part: Box | None = None,
    ) -> np.ndarray:
        """Resizes and crops in one step, which computes the kept pixels only.

        Args:
            image: in mode RGB.
            source: if the image is a reduced copy, width and height of the original.
            part: the box of the image that shows the original; may have fractions of pixels.

        Returns:
            uint8 of shape (size, size, 3), writable.

        Raises:
            ValueError: the image isn't RGB.
        """
        if image.mode != "RGB":
            raise ValueError(f"an RGB image is needed, not one in mode {image.mode}")
        new_size = (self.size, self.size)
        part = part or (0, 0, *image.size)
        if self.size >= SQUASH_FROM:
            return np.array(image.resize(new_size, self.resample, box=part))
        resized = self.resized_size(*(source or image.size))
        box = self._kept_box(part, resized)
        if _height_first(image.size, new_size) and not _height_first(image.size, resized):
            return np.array(self._resize_width_first(image, box, resized[1]))
        return np.array(image.resize(new_size, self.resample, box=box))

    def _resize_width_first(self, image: Image.Image, box: Box, resized_height: int) -> Image.Image:
        """The same as `image.resize` with this box, but for the order of its two passes."""
        left, top, right, bottom = box
        reach = math.ceil(FILTER_REACH * max(1.0, image.height / resized_height))
        first = max(0, math.floor(top) - reach)
        last = min(image.height, math.ceil(bottom) + reach)
        rows = image.crop((0, first, image.width, last))
        # Pillow leaves out the pass of an axis that neither changes its size nor has a box.
        narrow = rows.resize((self.size, rows.height), self.resample, box=(left, 0, right, rows.height))
        return narrow.resize(
            (self.size, self.size), self.resample, box=(0, top - first, self.size, bottom - first)
        )

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """Size before the crop of an image of this size, as transformers' get_resize_output_image_size."""
        if self.size >= SQUASH_FROM:
            return self.size, self.size
        shortest = int(self.size / self.crop_pct)
        if width <= height:
            return shortest, int(shortest * height / width)
        return int(shortest * width / height), shortest

    def crop_corner(self, width: int, height: int) -> tuple[int, int]:
        """Left and top of the crop in the resized image, rounded as transformers' center_crop."""
        return (width - self.size) // 2, (height - self.size) // 2

    def _kept_box(self, source: Box, resized: tuple[int, int]) -> Box:
        """The part of the source that the crop keeps."""
        left, top = self.crop_corner(*resized)
        width, height = source[2] - source[0], source[3] - source[1]
        # Multiplied first: the far edge is then the source's own where the crop reaches it.
        return (
            source[0] + left * width / resized[0],
            source[1] + top * height / resized[1],
            source[0] + (left + self.size) * width / resized[0],
            source[1] + (top + self.size) * height / resized[1],
        )


def _height_first(source: tuple[int, int], resized: tuple[int, int]) -> bool:
    """Whether Pillow, from version 13 on, resizes the height before the width.

    Each pass rounds to 8 bits, so the order shows in the pixels (some 0.3 gray levels on average)
    and has to be the one in which the uncropped image would be resized.
    """
    width_loss, height_loss = source[0] - resized[0], source[1] - resized[1]
    return height_loss > 0 and height_loss > 2 * width_loss
