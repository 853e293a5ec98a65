"""Decoding on the classifier's GPU: plain JPEGs by nvJPEG, everything else as `decode.cpu` does.

Returns the same chunks as `decode_chunk` except for the pixels: they are on the device, and differ from
Pillow's by color upsampling and rounding. The file alone determines which of the two decodes an image,
unless the GPU fails, for lack of memory, say: then another attempt may give other pixels.
"""

import io
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from cvt.inference.device_preprocessing import DevicePreprocessor
from cvt.preprocessing import Preprocessor
from pipeline.config import NO_TORCHVISION
from pipeline.decode import decode, decode_chunk
from pipeline.decode.cpu import (
    Decoded,
    Turn,
    exchanged,
    pillow_warnings_ignored,
    too_large,
    turn_of,
    with_outcomes,
)
from pipeline.read import Chunk
from pipeline.statistics import DECODE, StageMetrics

logger = logging.getLogger("cvt_label")

#: Pixels of a batch of images: some 200 MB, and four times that for the image that is being resized.
PIXELS_AT_ONCE = 64_000_000

#: JPEG files to RGB images, uint8 (3, height, width), on the device; raises if any can't be decoded.
DecodeJpegs = Callable[[list[bytes]], list[Tensor]]

_SAME_GRAY_LEVELS = 3  # between two decoders of the same smooth JPEG, on average

# Longer images are left to the CPU too: here, all of an image is resized, though the crop keeps little.
MAX_ASPECT_RATIO = 16

# Of a frame: baseline, extended and progressive, with Huffman codes. Further markers up to 0xCF, but for
# three, are of frames too: lossless, hierarchical, or with arithmetic coding.
HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
START_OF_SCAN = 0xDA
END_OF_IMAGE = b"\xff\xd9"

# Horizontal and vertical sampling of luminance, where that of color is 1 x 1: 4:4:4 to 4:1:1.
SAMPLINGS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))


@dataclass(frozen=True, slots=True)
class PlainJpeg:
    """A JPEG that any decoder reads alike, as far as its headers tell.

    Attributes:
        row: the JPEG's place in the chunk.
        width, height: in pixels, as stored.
    """

    row: int
    data: bytes
    width: int
    height: int
    turn: Turn | None


@pillow_warnings_ignored
def plain_jpeg(row: int, data: bytes, max_pixels: int) -> PlainJpeg | None:
    """The JPEG, if nothing in its headers is unusual, and it is complete; else None.

    Unusual is what decoders may take differently, or not at all: other colors than gray and YCbCr, other
    codes than Huffman's, odd sampling, a very large or long image.
    """
    if not data.endswith(END_OF_IMAGE) or _frame(data) not in HUFFMAN_FRAMES:
        return None
    try:
        file = JpegImageFile(io.BytesIO(data))
        width, height = file.size
        components = [part[0] for part in file.layer]
        samplings = [part[1:3] for part in file.layer]
    except Exception:  # whatever it is, the CPU decoder runs into it too
        return None
    gray = samplings == [(1, 1)]
    # Adobe's marker, and other numbers of the components, may say that it is RGB.
    color = components == [1, 2, 3] and file.info.get("adobe_transform", 1) == 1
    color = color and samplings[0] in SAMPLINGS and samplings[1:] == [(1, 1)] * 2
    if not (gray or color) or too_large(width, height, max_pixels):
        return None
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        return None
    return PlainJpeg(row, data, width, height, turn_of(file))


def _frame(data: bytes) -> int | None:
    """The marker of a JPEG's only frame; None if there are others before the first scan, or gaps."""
    frame, at = None, 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == START_OF_SCAN:
            return frame
        # Between these there are Huffman tables (C4), an extension (C8) and arithmetic coding's tables (CC).
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if frame is not None:
                return None
            frame = marker
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


class GpuDecoder:
    """Decodes chunks to pixels on a device.

    An image that the GPU doesn't decode, for whatever reason, is left to the CPU, whose word on what is
    wrong with it counts. May be called from several threads at once.

    Args:
        decode_jpegs: the decoder of plain JPEGs; nvJPEG, in torchvision, if None.
        threads: for the images that are left to the CPU.
        pixels_at_once: of the images in a batch; larger images are left to the CPU.

    Raises:
        ImportError: torchvision isn't installed.
        ValueError: torchvision can't decode on this device, or the preprocessing can't be done there.
    """

    def __init__(
        self,
        preprocessor: Preprocessor,
        max_pixels: int,
        device: torch.device | str,
        decode_jpegs: DecodeJpegs | None = None,
        threads: int = 2,
        pixels_at_once: int = PIXELS_AT_ONCE,
    ) -> None:
        self._preprocessor = preprocessor
        self._resize = DevicePreprocessor(preprocessor)
        self._max_pixels = max_pixels
        self._pixels_at_once = pixels_at_once
        self._device = torch.device(device)
        # A stream of its own doesn't wait for what a model computes.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._decode_jpegs = decode_jpegs or nvjpeg(self._device)
        self._cpu = ThreadPoolExecutor(threads, "decode")
        self._device_lock = threading.Lock()
        self._has_failed = False

    def __call__(self, chunk: Chunk) -> Chunk:
        """Does the same as `decode_chunk`, with pixels on the device, unless the device has no memory."""
        try:
            return self._decode_chunk(chunk)
        except torch.OutOfMemoryError as error:
            count = len(chunk.samples)
            logger.warning("the GPU is out of memory, the CPU decodes %d images: %s", count, error)
        torch.cuda.empty_cache()  # the engine beside may need it
        decoded = decode_chunk(chunk, self._preprocessor, self._max_pixels)
        return replace(decoded, metrics={**decoded.metrics, DECODE: StageMetrics()})

    def _decode_chunk(self, chunk: Chunk) -> Chunk:
        samples, size = chunk.samples, self._preprocessor.size
        outcomes = [Decoded(None, None, None, error) for error in samples["error"].to_pylist()]
        plain: list[PlainJpeg] = []
        left: dict[int, Future[Decoded]] = {}
        for row, image in enumerate(samples["image"]):
            if outcomes[row].error is not None:
                continue
            data = image.as_buffer().to_pybytes()
            jpeg = plain_jpeg(row, data, min(self._max_pixels, self._pixels_at_once))
            if jpeg is None:
                left[row] = self._leave_to_cpu(data)
            else:
                plain.append(jpeg)
        with self._device_to_itself():
            pixels = torch.empty((len(outcomes), size, size, 3), dtype=torch.uint8, device=self._device)
            batches = _batches(plain, self._pixels_at_once)
            done = set[int]().union(*(self._on_device(batch, pixels) for batch in batches))
        for jpeg in plain:
            if jpeg.row in done:
                size_shown = exchanged((jpeg.width, jpeg.height), jpeg.turn)
                outcomes[jpeg.row] = Decoded(None, *size_shown, None)
            else:
                left[jpeg.row] = self._leave_to_cpu(jpeg.data)
        by_cpu = {row: future.result() for row, future in left.items()}
        with self._device_to_itself():
            arrays = {row: image.pixels for row, image in by_cpu.items() if image.pixels is not None}
            if arrays:
                rows = torch.tensor([*arrays], dtype=torch.int64, device=self._device)
                pixels[rows] = torch.from_numpy(np.stack([*arrays.values()])).to(self._device)
            outcomes = [by_cpu.get(row, known)._replace(pixels=None) for row, known in enumerate(outcomes)]
            good = [row for row, outcome in enumerate(outcomes) if outcome.error is None]
            if len(good) < len(outcomes):
                pixels = pixels[torch.tensor(good, dtype=torch.int64, device=self._device)]
        metrics = {**chunk.metrics, DECODE: StageMetrics(decoded_on_gpu=len(done))}
        return replace(chunk, samples=with_outcomes(samples, outcomes), pixels=pixels, metrics=metrics)

    def _leave_to_cpu(self, data: bytes) -> Future[Decoded]:
        return self._cpu.submit(decode, data, self._preprocessor, self._max_pixels)

    def _on_device(self, jpegs: Sequence[PlainJpeg], pixels: Tensor, is_half: bool = False) -> set[int]:
        """Decodes JPEGs into their rows of the pixels; after a failure, each half of them.

        Returns:
            The rows that are done: those that fail alone are left to the CPU.
        """
        try:
            for jpeg, image in zip(jpegs, self._decode_jpegs([jpeg.data for jpeg in jpegs]), strict=True):
                if image.shape != (3, jpeg.height, jpeg.width):
                    raise ValueError(f"{tuple(image.shape)}, not {jpeg.height, jpeg.width} as in the header")
                pixels[jpeg.row] = self._resize(_turned(image, jpeg.turn))
            return {jpeg.row for jpeg in jpegs}
        except Exception as error:
            level = logging.DEBUG if self._has_failed else logging.WARNING
            self._has_failed = True
            logger.log(level, "the GPU failed to decode %d JPEGs, trying each half: %s", len(jpegs), error)
        if len(jpegs) == 1:
            return set()
        if not is_half:
            # nvJPEG gets no memory that PyTorch keeps for later, and its errors don't say so. Freed only
            # here: the error has held on to what was decoded.
            torch.cuda.empty_cache()
        half = len(jpegs) // 2
        first = self._on_device(jpegs[:half], pixels, is_half=True)
        return first | self._on_device(jpegs[half:], pixels, is_half=True)

    @contextmanager
    def _device_to_itself(self) -> Iterator[None]:
        """One chunk at a time: nvJPEG may decode into memory that a stream still reads for another chunk."""
        with self._device_lock:
            if self._stream is None:
                yield
                return
            with torch.cuda.stream(self._stream):
                yield
                done = torch.cuda.Event(blocking=True)  # waits for what was queued, and keeps no CPU busy
                done.record()
            done.synchronize()


def _turned(image: Tensor, turn: Turn | None) -> Tensor:
    """Turns an image (3, height, width) upright."""
    if turn is None:
        return image
    reflected = [axis for axis, flag in ((1, turn.from_below), (2, turn.from_right)) if flag]
    image = image.mT if turn.is_sideways else image
    return image.flip(reflected) if reflected else image


def _batches(jpegs: Sequence[PlainJpeg], max_pixels: int) -> Iterator[Sequence[PlainJpeg]]:
    """Cuts JPEGs into batches of at most `max_pixels`, in their order."""
    start, pixels = 0, 0
    for end, jpeg in enumerate(jpegs):
        pixels += jpeg.width * jpeg.height
        if pixels > max_pixels:
            yield jpegs[start:end]
            start, pixels = end, jpeg.width * jpeg.height
    if jpegs:
        yield jpegs[start:]


def nvjpeg(device: torch.device) -> DecodeJpegs:
    """Returns NVIDIA's decoder, of torchvision; raises as `GpuDecoder`."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except (ImportError, RuntimeError, OSError) as error:  # of which the last two are of another build
        raise ImportError(f"decoding on a GPU needs torchvision ({error}): {NO_TORCHVISION}") from error

    def decode_jpegs(files: list[bytes]) -> list[Tensor]:
        # torchvision decodes on a stream of its own into memory that it asks for on the current one, but
        # doesn't wait for that: without this, it overwrites images that are still being resized
        # (https://github.com/pytorch/vision/pull/9606).
        torch.cuda.current_stream(device).synchronize()
        tensors = [torch.from_numpy(np.frombuffer(file, np.uint8).copy()) for file in files]
        try:
            images: list[Tensor] = decode_jpeg(tensors, mode=ImageReadMode.RGB, device=device)
        except Exception:
            torch.cuda.synchronize(device)  # it may still be writing to memory that it has given up
            raise
        return images

    try:
        _check(decode_jpegs)
    except Exception as error:
        cause = f"torchvision can't decode JPEGs on {device.type!r} ({error})"
        raise ValueError(f"{cause}: {NO_TORCHVISION}") from error
    return decode_jpegs


def _check(decode_jpegs: DecodeJpegs) -> None:
    """Raises ValueError unless a batch of different JPEGs comes out as Pillow decodes it.

    A decoder that skips an image without saying so leaves in its place what was in memory.
    """
    x, y = np.meshgrid(np.linspace(0, 255, 97), np.linspace(0, 255, 75))
    smooth = Image.fromarray(np.stack([x, y, 255 - (x + y) / 2], -1).astype(np.uint8))
    files: list[bytes] = []
    for mode, progressive, subsampling in itertools.product(("RGB", "L"), (False, True), (0, 1, 2)):
        stream = io.BytesIO()
        image = smooth.convert(mode).crop((0, 0, 97 - len(files), 75))
        image.save(stream, "JPEG", quality=95, progressive=progressive, subsampling=subsampling)
        files.append(stream.getvalue())
    for file, found in zip(files, decode_jpegs(files), strict=True):
        wanted = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), np.int16)
        difference = np.abs(found.permute(1, 2, 0).cpu().numpy() - wanted).mean()
        if difference > _SAME_GRAY_LEVELS:
            raise ValueError(f"an image comes out {difference:.0f} gray levels from what it is")
