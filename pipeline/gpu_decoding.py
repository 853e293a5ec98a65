"""Decoding on the GPU that classifies: plain JPEGs by nvJPEG, everything else as `pipeline.decoding` does.

Chunks in, the same chunks out as from `decode_chunk`, but for their pixels: these are on the device, and
differ from Pillow's by how the decoders upsample colour and where they round.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from cvt.device_preprocessing import DevicePreprocessor
from cvt.preprocessing import Preprocessor
from pipeline.chunks import Chunk
from pipeline.decoding import SIDEWAYS, Decoded, decode, too_large, turn_of, with_outcomes
from pipeline.stages import DECODE

logger = logging.getLogger("cvt_label")

#: JPEG files to RGB images, uint8 (3, height, width), on the device; raises if any can't be decoded.
DecodeJpegs = Callable[[list[bytes]], list[Tensor]]

#: Pixels that are decoded at once, of several images or of one: some 200 MB, and four times that of the
#: image that is being resized. Larger images are left to the CPU.
PIXELS_AT_ONCE = 64_000_000

# Longer images are left to the CPU too: here, all of an image is resized, though the crop keeps little.
MAX_ASPECT_RATIO = 16

# Of a frame: baseline, extended and progressive, with Huffman codes. Further markers up to 0xCF, but for
# three, are of frames too: lossless, hierarchical, or with arithmetic coding.
HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
START_OF_SCAN = 0xDA
END_OF_IMAGE = b"\xff\xd9"

# Horizontal and vertical sampling of luminance, where that of colour is 1 x 1: 4:4:4 to 4:1:1.
SAMPLINGS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))

TURNS: dict[Image.Transpose, Callable[[Tensor], Tensor]] = {
    Image.Transpose.FLIP_LEFT_RIGHT: lambda image: image.flip(2),
    Image.Transpose.ROTATE_180: lambda image: image.flip(1, 2),
    Image.Transpose.FLIP_TOP_BOTTOM: lambda image: image.flip(1),
    Image.Transpose.TRANSPOSE: lambda image: image.mT,
    Image.Transpose.ROTATE_270: lambda image: image.mT.flip(2),
    Image.Transpose.TRANSVERSE: lambda image: image.mT.flip(1, 2),
    Image.Transpose.ROTATE_90: lambda image: image.mT.flip(1),
}


@dataclass(frozen=True, slots=True)
class PlainJpeg:
    """A JPEG that any decoder reads alike, as far as its headers tell.

    Attributes:
        row: its place in the chunk.
        data: the file.
        width: in pixels, as stored.
        height: likewise.
        turn: what makes it upright; None if it is.
    """

    row: int
    data: bytes
    width: int
    height: int
    turn: Image.Transpose | None

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height as displayed."""
        return (self.height, self.width) if self.turn in SIDEWAYS else (self.width, self.height)


class GpuDecoder:
    """Decodes chunks to pixels on a device.

    An image that the GPU doesn't decode, for whatever reason, is left to the CPU, whose word on what is
    wrong with it counts. May be called from several threads at once.

    Args:
        preprocessor: makes the model's input of an image.
        max_pixels: larger images are an error.
        device: where the pixels are wanted.
        decode_jpegs: the decoder of plain JPEGs; nvJPEG, in torchvision, if None.
        threads: for the images that are left to the CPU.

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
    ) -> None:
        self._preprocessor = preprocessor
        self._resize = DevicePreprocessor(preprocessor)
        self._max_pixels = max_pixels
        self._device = torch.device(device)
        # Its own, so that it doesn't wait for what a model computes.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._decode_jpegs = decode_jpegs or nvjpeg(self._device)
        self._cpu = ThreadPoolExecutor(threads, "decode")
        self._turn = threading.Lock()

    def __call__(self, chunk: Chunk) -> Chunk:
        """The same as `pipeline.decoding.decode_chunk`, with pixels on the device, ready to be used.

        Its `spent` says how many images were decoded there, as `decode.on_gpu`.
        """
        samples, size = chunk.samples, self._preprocessor.size
        outcomes: list[Decoded] = []
        plain: list[PlainJpeg] = []
        left: dict[int, Future[Decoded]] = {}
        for row, (image, error) in enumerate(
            zip(samples["image"], samples["error"].to_pylist(), strict=True)
        ):
            outcomes.append(Decoded(None, None, None, error))
            if error is not None:
                continue
            data = image.as_buffer().to_pybytes()
            jpeg = plain_jpeg(row, data, self._max_pixels)
            if jpeg is None:
                left[row] = self._leave_to_cpu(data)
            else:
                plain.append(jpeg)
        with self._device_to_itself():
            pixels = torch.empty((len(outcomes), size, size, 3), dtype=torch.uint8, device=self._device)
            for batch in _batches(plain):
                for jpeg in self._decoded(batch, pixels):
                    outcomes[jpeg.row] = Decoded(None, *jpeg.upright_size, None)
        refused = [jpeg for jpeg in plain if outcomes[jpeg.row].width is None]
        left |= {jpeg.row: self._leave_to_cpu(jpeg.data) for jpeg in refused}
        by_cpu = {row: future.result() for row, future in left.items()}
        with self._device_to_itself():
            self._put(by_cpu, pixels)
            outcomes = [
                by_cpu.get(row, outcome)._replace(pixels=None) for row, outcome in enumerate(outcomes)
            ]
            good = [row for row, outcome in enumerate(outcomes) if outcome.error is None]
            if len(good) < len(outcomes):
                pixels = pixels[torch.tensor(good, dtype=torch.int64, device=self._device)]
        spent = {**chunk.spent, f"{DECODE}.on_gpu": len(plain) - len(refused)}
        return replace(chunk, samples=with_outcomes(samples, outcomes), pixels=pixels, spent=spent)

    def _leave_to_cpu(self, data: bytes) -> Future[Decoded]:
        return self._cpu.submit(decode, data, self._preprocessor, self._max_pixels)

    def _decoded(self, jpegs: Sequence[PlainJpeg], pixels: Tensor) -> Sequence[PlainJpeg]:
        """Decodes and resizes JPEGs, each into its row; returns those for which this worked.

        Where it doesn't, it is tried with each half, be it for an image at fault or for lack of memory.
        """
        try:
            self._decode(jpegs, pixels)
            return jpegs
        except Exception as error:
            logger.info("the GPU failed to decode %d JPEGs: %s", len(jpegs), error)
            out_of_memory = "out of memory" in str(error)  # in torchvision, its type is lost
        if len(jpegs) == 1:
            return []
        if out_of_memory:  # and freed only here: the error has held on to what was decoded
            torch.cuda.empty_cache()
        half = len(jpegs) // 2
        return [*self._decoded(jpegs[:half], pixels), *self._decoded(jpegs[half:], pixels)]

    def _decode(self, jpegs: Sequence[PlainJpeg], pixels: Tensor) -> None:
        images = self._decode_jpegs([jpeg.data for jpeg in jpegs])
        for jpeg, image in zip(jpegs, images, strict=True):
            if image.shape != (3, jpeg.height, jpeg.width):
                raise ValueError(f"{tuple(image.shape)}, where the header says {(jpeg.height, jpeg.width)}")
            upright = image if jpeg.turn is None else TURNS[jpeg.turn](image)
            self._resize([upright], pixels[jpeg.row : jpeg.row + 1])

    def _put(self, decoded: Mapping[int, Decoded], pixels: Tensor) -> None:
        """Copies what the CPU decoded into its rows."""
        arrays = {row: image.pixels for row, image in decoded.items() if image.pixels is not None}
        if arrays:
            rows = torch.tensor([*arrays], dtype=torch.int64, device=self._device)
            pixels[rows] = torch.from_numpy(np.stack([*arrays.values()])).to(self._device)

    @contextmanager
    def _device_to_itself(self) -> Iterator[None]:
        """One chunk at a time: into memory that a stream is done with for one, another may decode (`nvjpeg`).

        Waits at its end for what was queued on the device.
        """
        with self._turn:
            if self._stream is None:
                yield
                return
            with torch.cuda.stream(self._stream):
                yield
            self._stream.synchronize()


def _batches(jpegs: Sequence[PlainJpeg]) -> Iterator[Sequence[PlainJpeg]]:
    """Cuts JPEGs into batches of at most PIXELS_AT_ONCE, in their order."""
    start, pixels = 0, 0
    for end, jpeg in enumerate(jpegs):
        pixels += jpeg.width * jpeg.height
        if pixels > PIXELS_AT_ONCE:
            yield jpegs[start:end]
            start, pixels = end, jpeg.width * jpeg.height
    if jpegs:
        yield jpegs[start:]


def plain_jpeg(row: int, data: bytes, max_pixels: int) -> PlainJpeg | None:
    """The JPEG, if nothing in its headers is unusual, and it is complete; else None.

    Unusual is what decoders may take differently, or not at all: other colours than gray and YCbCr, other
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
    colour = components == [1, 2, 3] and file.info.get("adobe_transform", 1) == 1
    colour = colour and samplings[0] in SAMPLINGS and samplings[1:] == [(1, 1)] * 2
    if not (gray or colour) or too_large(width, height, min(max_pixels, PIXELS_AT_ONCE)):
        return None
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        return None
    return PlainJpeg(row, data, width, height, turn_of(file))


def _frame(data: bytes) -> int | None:
    """The marker of a JPEG's frame; None if there isn't exactly one before the first scan.

    Strict: the segments follow one another without a gap, or it is None.
    """
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


def nvjpeg(device: torch.device) -> DecodeJpegs:
    """NVIDIA's decoder, on a GPU, by torchvision.

    Raises:
        ImportError: torchvision isn't installed, or doesn't fit PyTorch.
        ValueError: it can't decode on this device.
    """
    remedy = (
        "install the torchvision that fits this PyTorch (pip install torchvision), or set decode.device: cpu"
    )
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except (ImportError, RuntimeError, OSError) as error:  # of which the last two are of another build
        raise ImportError(f"decoding on a GPU needs torchvision ({error}): {remedy}") from error

    def decode_jpegs(files: list[bytes]) -> list[Tensor]:
        # torchvision decodes on a stream of its own into memory that it asks for on the current one, but
        # doesn't wait for that: without this, it overwrites images that are still being resized
        # (https://github.com/pytorch/vision/pull/9606).
        torch.cuda.current_stream(device).synchronize()
        tensors = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
        try:
            images: list[Tensor] = decode_jpeg(tensors, mode=ImageReadMode.RGB, device=device)
        except Exception:
            torch.cuda.synchronize(device)  # it may still be writing to memory that it has given up
            raise
        return images

    stream = io.BytesIO()
    Image.new("RGB", (256, 256)).save(stream, "JPEG")
    try:
        decode_jpegs([stream.getvalue()])
    except Exception as error:
        raise ValueError(f"torchvision can't decode JPEGs on {device.type!r} ({error}): {remedy}") from error
    return decode_jpegs
