"""Decodes on the GPU of a classifier: plain JPEGs with nvJPEG, all other images with `decode.cpu`.

The results equal those of `decode_chunk`, except for the pixels: nvJPEG upsamples colors and rounds
differently. The file and `decode.cpu_share` alone determine which decoder is used, except after a failure of
the GPU or the death of the worker: the CPU then decodes the image.
"""

import io
import itertools
import logging
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from cvt.inference.device_preprocessing import DevicePreprocessor
from pipeline.config import NO_TORCHVISION
from pipeline.decode import DecodeOptions, decode, decode_chunk
from pipeline.decode.cpu import Decoded, Orientation, decoded_chunk, displayed_size
from pipeline.decode.plain_jpeg import PlainJpeg, parse_plain_jpeg
from pipeline.read import Chunk
from pipeline.statistics import StageMetrics, StageTimer

logger = logging.getLogger("cvt_label")

#: Maximum number of pixels in a batch: about 200 MB, and four times as much for the image being resized.
MAX_BATCH_PIXELS = 64_000_000

#: Decodes JPEGs to RGB images on the device, uint8 (3, height, width); raises if a file can't be decoded.
DecodeJpegs = Callable[[list[bytes]], list[Tensor]]

#: The last bytes of a JPEG are compressed pixels: they differ between images, and their hash takes 1 us.
_HASHED_BYTES = 1024

#: Maximum mean difference in gray levels between two decoders of the same smooth JPEG.
_MAX_DIFFERENCE = 3


class GpuDecoder:
    """Decodes chunks to pixels on a device. Thread-safe.

    The CPU decodes each image that the GPU does not decode, and determines the image's error.

    Args:
        options: how to decode an image; on the GPU, `timeout_s` has no effect.
        decode_jpegs: decodes plain JPEGs; None for nvJPEG through torchvision.
        threads: number of threads that decode on the CPU.
        max_batch_pixels: maximum number of pixels in a batch; the CPU decodes larger images.
        cpu_share: fraction of the images that the CPU decodes while the GPU decodes the others.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: torchvision can't decode on this device, or the device can't do this preprocessing.
    """

    def __init__(
        self,
        options: DecodeOptions,
        device: torch.device | str,
        decode_jpegs: DecodeJpegs | None = None,
        threads: int = 2,
        max_batch_pixels: int = MAX_BATCH_PIXELS,
        cpu_share: float = 0.0,
    ) -> None:
        self._options, self._cpu_share = options, cpu_share
        self._resize = DevicePreprocessor(options.preprocessor)
        self._max_batch_pixels = max_batch_pixels
        self._device = torch.device(device)
        # On a separate stream, decoding does not wait for the model.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._decode_jpegs = decode_jpegs or nvjpeg(self._device)
        self._cpu = ThreadPoolExecutor(threads, "decode")
        self._device_lock = threading.Lock()
        self._has_failed = False
        self._timer = StageTimer()

    def __call__(self, chunk: Chunk) -> Chunk:
        """Decodes a chunk as `decode_chunk` does; pixels are on the device unless its memory is full."""
        try:
            with self._timer:
                outcomes, pixels, decoded_on_gpu = self._decode_images(chunk.samples)
            metrics = self._timer.collect() + StageMetrics(decoded_on_gpu=decoded_on_gpu)
            return decoded_chunk(chunk, outcomes, pixels, metrics)
        except torch.OutOfMemoryError as error:
            count = len(chunk.samples)
            logger.warning("the GPU is out of memory; the CPU decodes %d images: %s", count, error)
        torch.cuda.empty_cache()  # the engine on the same GPU may need the memory
        return decode_chunk(chunk, self._options)

    def _decode_images(self, samples: pa.Table) -> tuple[list[Decoded], Tensor, int]:
        """Returns the outcome of each sample, the pixels, and the number of images that the GPU decoded."""
        size, max_pixels = self._options.preprocessor.size, self._options.max_pixels
        outcomes = [Decoded(None, None, None, error) for error in samples["error"].to_pylist()]
        plain: list[PlainJpeg] = []
        on_cpu: dict[int, Future[Decoded]] = {}
        for row, image in enumerate(samples["image"]):
            if outcomes[row].error is not None:
                continue
            data = image.as_buffer().to_pybytes()
            is_on_cpu = is_for_cpu(data, self._cpu_share)
            jpeg = None if is_on_cpu else parse_plain_jpeg(row, data, min(max_pixels, self._max_batch_pixels))
            if jpeg is None:
                on_cpu[row] = self._cpu.submit(decode, data, self._options)
            else:
                plain.append(jpeg)
        with self._exclusive_device():
            pixels = torch.empty((len(outcomes), size, size, 3), dtype=torch.uint8, device=self._device)
            batches = _batches(plain, self._max_batch_pixels)
            done = set[int]().union(*(self._on_device(batch, pixels) for batch in batches))
        for jpeg in plain:
            if jpeg.row in done:
                width, height = displayed_size((jpeg.width, jpeg.height), jpeg.orientation)
                outcomes[jpeg.row] = Decoded(None, width, height, None)
            else:
                on_cpu[jpeg.row] = self._cpu.submit(decode, jpeg.data, self._options)
        for row, future in on_cpu.items():
            outcomes[row] = future.result()
        with self._exclusive_device():
            arrays = {row: image.pixels for row, image in enumerate(outcomes) if image.pixels is not None}
            if arrays:
                rows = torch.tensor([*arrays], dtype=torch.int64, device=self._device)
                pixels[rows] = torch.from_numpy(np.stack([*arrays.values()])).to(self._device)
            good = [row for row, outcome in enumerate(outcomes) if outcome.error is None]
            if len(good) < len(outcomes):
                pixels = pixels[torch.tensor(good, dtype=torch.int64, device=self._device)]
        return outcomes, pixels, len(done)

    def _on_device(self, jpegs: Sequence[PlainJpeg], pixels: Tensor) -> set[int]:
        """Decodes JPEGs into their rows of `pixels`; returns these rows. After a failure, tries each half."""
        try:
            for jpeg, image in zip(jpegs, self._decode_jpegs([jpeg.data for jpeg in jpegs]), strict=True):
                if image.shape != (3, jpeg.height, jpeg.width):
                    expected = jpeg.height, jpeg.width
                    raise ValueError(f"decoded to {tuple(image.shape)}, but the header has {expected}")
                pixels[jpeg.row] = self._resize(_turn_upright(image, jpeg.orientation))
            return {jpeg.row for jpeg in jpegs}
        except Exception as error:
            level = logging.DEBUG if self._has_failed else logging.WARNING
            self._has_failed = True
            logger.log(level, "the GPU failed to decode %d JPEGs; trying each half: %s", len(jpegs), error)
        if len(jpegs) == 1:
            return set()
        # nvJPEG can't use memory that PyTorch caches, and its errors do not mention memory. Inside the
        # handler, the exception still references decoded images.
        torch.cuda.empty_cache()
        half = len(jpegs) // 2
        return self._on_device(jpegs[:half], pixels) | self._on_device(jpegs[half:], pixels)

    @contextmanager
    def _exclusive_device(self) -> Iterator[None]:
        """Lets one chunk use the device: nvJPEG may write to memory that another chunk still reads."""
        with self._device_lock:
            if self._stream is None:
                yield
                return
            with torch.cuda.stream(self._stream):
                yield
                done = torch.cuda.Event(blocking=True)  # the wait for queued work does not use the CPU
                done.record()
            done.synchronize()


def is_for_cpu(data: bytes, share: float) -> bool:
    """Returns whether the CPU decodes a file; true for a fraction `share` of all files.

    A division that followed the clock would give other labels at each attempt: see `decode.cpu_share`.
    """
    return share > 0 and zlib.crc32(data[-_HASHED_BYTES:]) < share * 2**32


def _turn_upright(image: Tensor, orientation: Orientation | None) -> Tensor:
    """Turns an image (3, height, width) upright."""
    if orientation is None:
        return image
    flips = ((1, orientation.flips_vertically), (2, orientation.flips_horizontally))
    image = image.mT if orientation.swaps_sides else image
    return image.flip([axis for axis, is_flipped in flips if is_flipped])


def _batches(jpegs: Sequence[PlainJpeg], max_pixels: int) -> Iterator[Sequence[PlainJpeg]]:
    """Splits JPEGs into batches of at most `max_pixels` pixels, in order."""
    start, pixels = 0, 0
    for end, jpeg in enumerate(jpegs):
        pixels += jpeg.width * jpeg.height
        if pixels > max_pixels:
            yield jpegs[start:end]
            start, pixels = end, jpeg.width * jpeg.height
    if jpegs:
        yield jpegs[start:]


def nvjpeg(device: torch.device) -> DecodeJpegs:
    """Returns the decoder nvJPEG of torchvision. Raises the same errors as `GpuDecoder`."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except (ImportError, RuntimeError, OSError) as error:  # also a build for another PyTorch
        raise ImportError(f"decoding on a GPU needs torchvision ({error}): {NO_TORCHVISION}") from error

    def decode_jpegs(files: list[bytes]) -> list[Tensor]:
        # torchvision decodes on its own stream, into memory of the current stream. Without this wait, it
        # overwrites images that are still being resized (https://github.com/pytorch/vision/pull/9606).
        torch.cuda.current_stream(device).synchronize()
        tensors = [torch.from_numpy(np.frombuffer(file, np.uint8).copy()) for file in files]
        try:
            images: list[Tensor] = decode_jpeg(tensors, mode=ImageReadMode.RGB, device=device)
        except Exception:
            torch.cuda.synchronize(device)  # torchvision may still write to memory that it has freed
            raise
        return images

    try:
        _check_decoder(decode_jpegs)
    except Exception as error:
        cause = f"torchvision can't decode JPEGs on {device.type!r} ({error})"
        raise ValueError(f"{cause}: {NO_TORCHVISION}") from error
    return decode_jpegs


def _check_decoder(decode_jpegs: DecodeJpegs) -> None:
    """Raises ValueError unless a batch of different JPEGs is decoded as by Pillow.

    A decoder that skips an image returns uninitialized memory in its place.
    """
    x, y = np.meshgrid(np.linspace(0, 255, 97), np.linspace(0, 255, 75))
    smooth = Image.fromarray(np.stack([x, y, 255 - (x + y) / 2], -1).astype(np.uint8))
    files: list[bytes] = []
    for mode, progressive, subsampling in itertools.product(("RGB", "L"), (False, True), (0, 1, 2)):
        stream = io.BytesIO()
        image = smooth.convert(mode).crop((0, 0, 97 - len(files), 75))
        image.save(stream, "JPEG", quality=95, progressive=progressive, subsampling=subsampling)
        files.append(stream.getvalue())
    for file, decoded in zip(files, decode_jpegs(files), strict=True):
        expected = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), np.int16)
        difference = np.abs(decoded.permute(1, 2, 0).cpu().numpy() - expected).mean()
        if difference > _MAX_DIFFERENCE:
            raise ValueError(f"a decoded image differs by {difference:.0f} gray levels on average")
