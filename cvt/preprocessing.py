"""What a checkpoint's preprocessor_config.json says, and the pixels that it asks for.

Resizes and crops to uint8 exactly where transformers' ConvNextImageProcessor (CvT's processor)
does. Neither decodes files nor normalises: the first is the pipeline's, the second the engine's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from huggingface_hub import hf_hub_download
from PIL import Image

FILE_NAME = "preprocessor_config.json"

# From this size on, ConvNextImageProcessor squashes the whole image into a square.
SQUASH_FROM = 384

# All names under which transformers has written this processor.
PROCESSOR_TYPES = frozenset(
    {
        "ConvNextImageProcessor",
        "ConvNextImageProcessorFast",
        "ConvNextImageProcessorPil",
        "ConvNextFeatureExtractor",
    }
)

# ConvNextImageProcessor's own defaults. IMAGENET_STANDARD, not the ImageNet statistics.
DEFAULT_SIZE = 384
DEFAULT_CROP_PCT = 224 / 256
DEFAULT_MEAN = (0.5, 0.5, 0.5)
DEFAULT_STD = (0.5, 0.5, 0.5)
DEFAULT_RESCALE_FACTOR = 1 / 255

NULL_BY_DEFAULT = frozenset(
    {"image_processor_type", "feature_extractor_type", "do_center_crop", "crop_size", "default_to_square"}
)

# With the other filters, nearest and box, rounding errors decide which pixels count: resizing a part
# isn't quite the same as taking a part of the resized.
SMOOTH_FILTERS = frozenset(Image.Resampling) - {Image.Resampling.NEAREST, Image.Resampling.BOX}

# Pixels around one, at the scale of the smaller image, that the widest of Pillow's filters uses.
FILTER_REACH = 5

# Left, top, right and bottom, in pixels of the source.
Box = tuple[float, float, float, float]


class PreprocessingError(ValueError):
    """A preprocessor_config.json that is missing, malformed or asks for what can't be honoured."""


@dataclass(frozen=True)
class Preprocessor:
    """Resizing and cropping as a checkpoint was trained with.

    Attributes:
        size: height and width of the result in pixels.
        crop_pct: below 384, the part of the resized image's shortest side that the crop keeps.
        resample: Pillow's number of the interpolation (`PIL.Image.Resampling`).
        mean: per channel, of the rescaled values; for the engine.
        std: per channel, of the rescaled values; for the engine.
        rescale_factor: what a grey level is multiplied with before normalisation; for the engine.
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

        Absent fields take ConvNextImageProcessor's defaults; fields that it doesn't use are ignored,
        as it does.

        Args:
            config: the parsed file.
            source: what the file is called in errors.

        Raises:
            PreprocessingError: a field is malformed or can't be honoured; names source and field.
        """
        fields = _Fields(config, source)
        fields.check_type()
        if not fields.flag("do_resize", default=True):
            fields.refuse("do_resize", "false, but the model needs images of one size")
        size = fields.shortest_edge()
        fields.check_center_crop(size)
        rescale = fields.flag("do_rescale", default=True)
        normalize = fields.flag("do_normalize", default=True)
        return cls(
            size=size,
            crop_pct=fields.number("crop_pct", DEFAULT_CROP_PCT, above=0.0, up_to=1.0),
            resample=fields.resample(),
            mean=fields.channels("image_mean", DEFAULT_MEAN) if normalize else (0.0,) * 3,
            std=fields.channels("image_std", DEFAULT_STD, above=0.0) if normalize else (1.0,) * 3,
            rescale_factor=(
                fields.number("rescale_factor", DEFAULT_RESCALE_FACTOR, above=0.0) if rescale else 1.0
            ),
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None) -> Preprocessor:
        """Reads the preprocessor_config.json of a checkpoint.

        Args:
            path: a folder, or a model's name on the Hugging Face hub.
            revision: branch, tag or commit on the hub; without meaning for a folder.

        Raises:
            PreprocessingError: there is no such file, or see `from_dict`; names the file.
        """
        if Path(path).is_dir():
            file = Path(path) / FILE_NAME
            source = str(file)
        else:
            file = _from_hub(str(path), revision)
            source = f"{path}/{FILE_NAME}"
        try:
            config = json.loads(file.read_bytes())
        except OSError as error:
            raise PreprocessingError(f"{source}: {error.strerror or error}") from error
        except ValueError as error:
            raise PreprocessingError(f"{source}: not JSON: {error}") from error
        if not isinstance(config, dict):
            raise PreprocessingError(f"{source}: not a JSON object, but {_shown(config)}")
        return cls.from_dict(config, source)

    def to_dict(self) -> dict[str, Any]:
        """The content of a preprocessor_config.json that says the same, for transformers too."""
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
        """Resizes and crops in one step that computes the kept pixels only.

        Args:
            image: in mode RGB.
            source: width and height of the image that this one is a reduced copy of, if it is one.
            part: where in it the source lies, left, top, right and bottom; need not be whole pixels.

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
            height: likewise.
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

    Each pass rounds to 8 bits, so the order shows in the pixels (some 0.3 grey levels on average)
    and has to be the one in which the uncropped image would be resized.
    """
    width_loss, height_loss = source[0] - resized[0], source[1] - resized[1]
    return height_loss > 0 and height_loss > 2 * width_loss


class _Fields:
    """The fields of one preprocessor_config.json, each checked as it is read."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        # Null where that is transformers' default is the same as absent. Elsewhere it is refused, as any
        # value of a wrong type: what it means there (none, false, the default) differs by field.
        self._config = {
            name: value for name, value in config.items() if value is not None or name not in NULL_BY_DEFAULT
        }
        self._source = source

    def refuse(self, field: str, problem: str) -> NoReturn:
        raise PreprocessingError(f"{self._source}: {field}: {problem}")

    def check_type(self) -> None:
        """A file without a type is fine: for CvT, transformers takes ConvNextImageProcessor."""
        for field in ("image_processor_type", "feature_extractor_type"):
            name = self._config.get(field, "ConvNextImageProcessor")
            if not isinstance(name, str) or name not in PROCESSOR_TYPES:
                self.refuse(field, f"{_shown(name)}, but only ConvNextImageProcessor is supported")

    def flag(self, field: str, default: bool) -> bool:
        value = self._config.get(field, default)
        if not isinstance(value, bool):
            self.refuse(field, f"neither true nor false, but {_shown(value)}")
        return value

    def number(self, field: str, default: float, above: float = -math.inf, up_to: float = math.inf) -> float:
        return self._checked_number(field, self._config.get(field, default), above, up_to)

    def channels(self, field: str, default: tuple[float, ...], above: float = -math.inf) -> tuple[float, ...]:
        """Three numbers, or one that holds for all three."""
        value = self._config.get(field, default)
        values = list(value) if isinstance(value, list | tuple) else [value] * 3
        if len(values) != 3:
            self.refuse(field, f"not three numbers (red, green, blue), but {_shown(value)}")
        return tuple(self._checked_number(field, item, above, math.inf) for item in values)

    def shortest_edge(self) -> int:
        value = self._config.get("size", DEFAULT_SIZE)
        if isinstance(value, Mapping):
            if set(value) != {"shortest_edge"}:
                self.refuse("size", f"only shortest_edge is supported, not {_shown(dict(value))}")
            value = value["shortest_edge"]
        elif self.flag("default_to_square", default=False):
            self.refuse("default_to_square", "true, but size is that of the shortest edge")
        return self._checked_length("size", value)

    def resample(self) -> int:
        value = self._config.get("resample", int(Image.Resampling.BICUBIC))
        if not _is_integer(value) or value not in SMOOTH_FILTERS:
            known = ", ".join(f"{int(known)} ({known.name.lower()})" for known in sorted(SMOOTH_FILTERS))
            self.refuse("resample", f"{_shown(value)} is none of {known}")
        return int(value)

    def check_center_crop(self, size: int) -> None:
        """A further crop is harmless where it keeps everything, and else not supported."""
        if not self.flag("do_center_crop", default=False):
            return
        value = self._config.get("crop_size")
        if value is None:
            self.refuse("crop_size", "missing, but do_center_crop is true")
        if value not in (size, {"height": size, "width": size}):
            self.refuse(
                "crop_size",
                f"{_shown(value)}, but do_center_crop can only be honoured at size ({size})",
            )

    def _checked_number(self, field: str, value: Any, above: float, up_to: float) -> float:
        if not (_is_integer(value) or isinstance(value, float)) or not math.isfinite(value):
            self.refuse(field, f"not a number, but {_shown(value)}")
        if not above < value <= up_to:
            limits = [f"above {above:g}"] * (above > -math.inf)
            limits += [f"at most {up_to:g}"] * (up_to < math.inf)
            self.refuse(field, f"{_shown(value)} is not {' and '.join(limits)}")
        return float(value)

    def _checked_length(self, field: str, value: Any) -> int:
        if not _is_integer(value) or value < 1:
            self.refuse(field, f"not a number of pixels, but {_shown(value)}")
        return int(value)


def _is_integer(value: Any) -> bool:
    # To Python, True is an int.
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value as JSON, short enough for an error message."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


def _from_hub(name: str, revision: str | None) -> Path:
    """The hub's preprocessor_config.json of a model, from the local cache where it is there."""
    try:
        return Path(hf_hub_download(name, FILE_NAME, revision=revision))
    # The hub's client has some ten kinds of errors, without a common base.
    except Exception as error:
        at = f" at revision {revision}" if revision else ""
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PreprocessingError(
            f"{name}: no such folder, and no {FILE_NAME} from the Hugging Face hub{at}: {cause}"
        ) from error
