"""The pixels that a checkpoint's preprocessor_config.json asks for.

Resizes and crops to uint8 as transformers' ConvNextImageProcessor, which is CvT's. Decoding files belongs to
the pipeline, normalization to the engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cvt.checks import is_flag, is_integer, is_number
from cvt.errors import CheckpointError, checkpoint_errors

FILE_NAME = "preprocessor_config.json"

# From this size on, ConvNextImageProcessor squashes the whole image into a square.
SQUASH_FROM = 384

# All names under which transformers has written this processor.
PROCESSOR_TYPES = (
    "ConvNextImageProcessor",
    "ConvNextImageProcessorFast",
    "ConvNextImageProcessorPil",
    "ConvNextFeatureExtractor",
)

# Null is transformers' default for these. Elsewhere its meaning differs by field, so it is refused.
NULL_BY_DEFAULT = ("image_processor_type", "feature_extractor_type", "do_center_crop", "default_to_square")

# With nearest and box, rounding errors decide which pixels count: resizing a part of an image differs from
# taking a part of the resized image.
SMOOTH_FILTERS = frozenset(Image.Resampling) - {Image.Resampling.NEAREST, Image.Resampling.BOX}
_FILTERS = ", ".join(f"{int(known)} ({known.name.lower()})" for known in sorted(SMOOTH_FILTERS))

# How far the widest of Pillow's filters reaches, in pixels of the smaller image.
FILTER_REACH = 5

# Left, top, right and bottom, in pixels of the source.
Box = tuple[float, float, float, float]


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
        fields = _Fields(config, source)
        for name in ("image_processor_type", "feature_extractor_type"):
            # Without a type, transformers takes this one for CvT.
            fields.read(name, PROCESSOR_TYPES[0], lambda value: value in PROCESSOR_TYPES, PROCESSOR_TYPES[0])
        fields.read("do_resize", True, lambda value: value is True, "true: the model's images have one size")
        size = fields.read("size", 384, _is_size, 'a number of pixels, or {"shortest_edge": pixels}')
        if isinstance(size, Mapping):
            size = size["shortest_edge"]
        else:
            wanted = "false, since size is the shortest edge"
            fields.read("default_to_square", False, lambda value: value is False, wanted)
        if fields.flag("do_center_crop", default=False):  # a further crop, which must keep everything
            whole = (size, {"height": size, "width": size})
            fields.read("crop_size", None, lambda value: value in whole, f"{size}, the size")
        rescale = fields.flag("do_rescale", default=True)
        normalize = fields.flag("do_normalize", default=True)
        return cls(
            size=size,
            crop_pct=fields.number("crop_pct", 224 / 256, up_to=1.0),
            resample=fields.read("resample", int(Image.Resampling.BICUBIC), _is_filter, f"one of {_FILTERS}"),
            mean=fields.channels("image_mean") if normalize else (0.0,) * 3,
            std=fields.channels("image_std", above=0.0) if normalize else (1.0,) * 3,
            rescale_factor=fields.number("rescale_factor", 1 / 255) if rescale else 1.0,
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
            raise CheckpointError(f"{file}: not a JSON object, but {_shown(config)}")
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
        """Width and height before the crop, as transformers' get_resize_output_image_size.

        Args:
            width: of the source image, in pixels.
            height: of the source image, in pixels.
        """
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


class _Fields:
    """The fields of one preprocessor_config.json, each checked as it is read."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self._config = config
        self._source = source

    def read(self, name: str, default: Any, holds: Callable[[Any], bool], wanted: str) -> Any:
        value = self._config.get(name, default)
        if value is None and name in NULL_BY_DEFAULT:
            return default
        if not holds(value):
            raise CheckpointError(f"{self._source}: {name}: must be {wanted}, not {_shown(value)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.read(name, default, is_flag, "true or false"))

    def number(self, name: str, default: float, up_to: float = math.inf) -> float:
        wanted = "a number above 0" + (f" and at most {up_to:g}" if up_to < math.inf else "")
        return float(self.read(name, default, lambda value: is_number(value) and 0 < value <= up_to, wanted))

    def channels(self, name: str, above: float = -math.inf) -> tuple[float, ...]:
        def holds(value: Any) -> bool:
            channels = _channels(value)
            return len(channels) == 3 and all(is_number(one) and one > above for one in channels)

        wanted = "one number, or three (red, green, blue)" + ", above 0" * (above == 0)
        # The default is IMAGENET_STANDARD, not the ImageNet statistics.
        return tuple(float(one) for one in _channels(self.read(name, 0.5, holds, wanted)))


def _channels(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * 3


def _is_length(value: Any) -> bool:
    return is_integer(value) and value > 0


def _is_size(value: Any) -> bool:
    if isinstance(value, Mapping):
        return value.keys() == {"shortest_edge"} and _is_length(value["shortest_edge"])
    return _is_length(value)


def _is_filter(value: Any) -> bool:
    return is_integer(value) and value in SMOOTH_FILTERS


def _shown(value: Any) -> str:
    """A value as JSON, short enough for an error message."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
