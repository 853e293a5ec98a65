"""Decoding on a device, with Pillow instead of nvJPEG: which decoder gets an image, and equal results."""

from __future__ import annotations

import io
import random
import sys
import threading
import time
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor

from cvt.preprocessing import Preprocessor
from pipeline.decode import DecodeOptions, decode_chunk
from pipeline.decode.gpu import GpuDecoder, is_for_cpu
from pipeline.decode.plain_jpeg import parse_plain_jpeg
from pipeline.read import Chunk
from pipeline.statistics import DECODE, StageMetrics
from tests.pipeline.decode.test_decoding import SAMPLES, claim, encode, exif, picture

LIMIT = 1_000_000
PREPROCESSOR = Preprocessor.from_dict({"size": 32}, "test")

pytestmark = pytest.mark.filterwarnings("ignore")


class PillowJpegs:
    """Decodes JPEGs as nvJPEG does: ignores EXIF orientation, and fails for the whole batch if one is bad."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, files: list[bytes]) -> list[Tensor]:
        self.batches.append(len(files))
        images = [np.array(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
        return [torch.from_numpy(image).permute(2, 0, 1) for image in images]


class CountingDecoder(GpuDecoder):
    """Counts the images that were decoded on the device and on the CPU."""

    on_device = on_cpu = 0

    def __call__(self, chunk: Chunk) -> Chunk:
        done = super().__call__(chunk)
        on_device = done.metrics.get(DECODE, StageMetrics()).decoded_on_gpu
        self.on_device += on_device
        self.on_cpu += chunk.samples["error"].null_count - on_device
        return done


def make_decoder(decode_jpegs: Any = None, max_pixels: int = LIMIT, **options: Any) -> CountingDecoder:
    return CountingDecoder(
        DecodeOptions(PREPROCESSOR, max_pixels), "cpu", decode_jpegs or PillowJpegs(), **options
    )


def chunk_of(images: Sequence[bytes | None]) -> Chunk:
    errors = ["no image" if image is None else None for image in images]
    samples = pa.table(
        {
            "key": [str(row) for row in range(len(images))],
            "error": pa.array(errors, pa.string()),
            "image": pa.array(images, pa.large_binary()),
        }
    )
    return Chunk(shard=3, start=10, samples=samples, total=99)


def assert_as_on_the_cpu(done: Chunk, images: Sequence[bytes | None], max_pixels: int = LIMIT) -> None:
    expected = decode_chunk(chunk_of(images), DecodeOptions(PREPROCESSOR, max_pixels))
    assert done.samples.equals(expected.samples)
    assert (done.shard, done.start, done.total) == (3, 10, 99)
    assert isinstance(done.pixels, Tensor)
    assert isinstance(expected.pixels, np.ndarray)
    assert done.pixels.dtype == torch.uint8
    assert done.pixels.shape == expected.pixels.shape
    for actual, wanted in zip(done.pixels.cpu().numpy(), expected.pixels, strict=True):
        assert np.abs(actual.astype(np.int16) - wanted).mean() < 0.5


def jpeg(size: tuple[int, int] = (56, 40), mode: str = "RGB", **options: Any) -> bytes:
    return encode(picture(mode, size), "JPEG", **options)


def without_tables() -> bytes:
    """A JPEG with valid headers, whose quantization tables are replaced by comments."""
    return jpeg().replace(b"\xff\xdb", b"\xff\xfe")


def as_rgb() -> bytes:
    """A JPEG whose colors are stored as RGB, as Adobe's marker declares."""
    return jpeg(keep_rgb=True)


def arithmetic() -> bytes:
    return jpeg().replace(b"\xff\xc0", b"\xff\xc9")


PLAIN = {
    "baseline": jpeg(),
    "progressive": jpeg(progressive=True),
    "gray": jpeg(mode="L"),
    "4:4:4": jpeg(subsampling=0),
    "4:2:2": jpeg(subsampling=1),
    "restarts": jpeg(restart_marker_rows=1),
    "profile": jpeg(icc_profile=b"\0" * 100_000),
    "comment": jpeg(comment=b"hello"),
    "tiny": jpeg((1, 1)),
    "second picture": encode(picture(), "MPO", save_all=True, append_images=[picture().rotate(180)]),
    **{f"orientation {value}": jpeg(exif=exif(value)) for value in range(1, 9)},
    "damaged EXIF": jpeg(exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
}
UNUSUAL = {
    **{name: data for name, data in SAMPLES.items() if not name.startswith("JPEG")},
    "CMYK": jpeg(mode="CMYK"),
    "RGB": as_rgb(),
    "arithmetic coding": arithmetic(),
    "truncated": jpeg((400, 300))[:-500],
    "data after its end": jpeg() + b"\0",
    "too large": claim("JPEG", 60000, 60000),
    "too long": jpeg((2000, 10)),
    "empty": b"",
    "no image": b"<!DOCTYPE html>",
    "only a start": b"\xff\xd8\xff\xd9",
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_jpeg_is_decoded_on_the_device(name: str) -> None:
    decoder = make_decoder()
    assert_as_on_the_cpu(decoder(chunk_of([PLAIN[name]])), [PLAIN[name]])
    assert (decoder.on_device, decoder.on_cpu) == (1, 0)


@pytest.mark.parametrize("name", UNUSUAL)
def test_other_images_are_decoded_on_the_cpu(name: str) -> None:
    decode_jpegs = PillowJpegs()
    decoder = make_decoder(decode_jpegs)
    assert_as_on_the_cpu(decoder(chunk_of([UNUSUAL[name]])), [UNUSUAL[name]])
    assert (decoder.on_device, decoder.on_cpu) == (0, 1)
    assert decode_jpegs.batches == []


def test_chunk_keeps_its_order_and_its_errors() -> None:
    images: list[bytes | None] = [*PLAIN.values(), None, *UNUSUAL.values(), without_tables()]
    random.Random(0).shuffle(images)
    decoder = make_decoder()
    assert_as_on_the_cpu(decoder(chunk_of(images)), images)
    assert (decoder.on_device, decoder.on_cpu) == (len(PLAIN), len(UNUSUAL) + 1)


@pytest.mark.parametrize("images", [[], [None], [b"\0"]])
def test_chunk_without_valid_images_has_no_pixels(images: list[bytes | None]) -> None:
    assert_as_on_the_cpu(make_decoder()(chunk_of(images)), images)


def test_image_at_the_pixel_limit_is_decoded_and_one_above_is_an_error() -> None:
    decoder = make_decoder(max_pixels=56 * 40)
    assert_as_on_the_cpu(decoder(chunk_of([jpeg()])), [jpeg()], 56 * 40)
    images = [jpeg((57, 40)), jpeg()]
    assert_as_on_the_cpu(decoder(chunk_of(images)), images, 56 * 40)
    assert (decoder.on_device, decoder.on_cpu) == (2, 1)


@pytest.mark.parametrize("bad", [[0], [8], [3, 4], [0, 2, 5, 7], [*range(9)]])
def test_corrupt_image_does_not_affect_its_batch(bad: list[int]) -> None:
    images = [without_tables() if row in bad else jpeg((50 + row, 60)) for row in range(9)]
    decoder = make_decoder()
    done = decoder(chunk_of(images))
    assert_as_on_the_cpu(done, images)
    assert [error is not None for error in done.samples["error"].to_pylist()] == [r in bad for r in range(9)]
    assert (decoder.on_device, decoder.on_cpu) == (9 - len(bad), len(bad))


def test_image_that_fails_on_the_device_is_decoded_on_the_cpu() -> None:
    def fail(files: list[bytes]) -> list[Tensor]:
        raise RuntimeError("Failed to decode jpeg stream: 5")

    decoder = make_decoder(fail)
    assert_as_on_the_cpu(decoder(chunk_of([*PLAIN.values()])), [*PLAIN.values()])
    assert (decoder.on_device, decoder.on_cpu) == (0, len(PLAIN))


def test_image_whose_size_differs_from_its_header_is_decoded_on_the_cpu() -> None:
    images = [jpeg(), jpeg((40, 40))]
    decoder = make_decoder(lambda files: [torch.zeros((3, 40, 40), dtype=torch.uint8) for _ in files])
    decoder(chunk_of(images))
    assert (decoder.on_device, decoder.on_cpu) == (1, 1)


def test_failed_resize_affects_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [jpeg((50 + row, 60)) for row in range(9)]
    decode_jpegs = PillowJpegs()
    decoder = make_decoder(decode_jpegs)
    resize = decoder._resize

    def fail(image: Tensor) -> Tensor:
        if image.shape[2] == 54:
            raise RuntimeError("Too much shared memory required")
        return resize(image)

    monkeypatch.setattr(decoder, "_resize", fail)
    assert_as_on_the_cpu(decoder(chunk_of(images)), images)
    assert decode_jpegs.batches == [9, 4, 5, 2, 1, 1, 3]
    assert (decoder.on_device, decoder.on_cpu) == (8, 1)


def test_pytorch_frees_cached_memory_when_the_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvJPEG allocates from the driver, and its errors do not mention memory."""
    free: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(True))

    class ShortOfMemory(PillowJpegs):
        def __call__(self, files: list[bytes]) -> list[Tensor]:
            if not free:
                raise RuntimeError("Failed to decode batch: 5")
            return super().__call__(files)

    decoder, images = make_decoder(ShortOfMemory()), [jpeg((50 + row, 60)) for row in range(8)]
    assert_as_on_the_cpu(decoder(chunk_of(images)), images)
    assert (decoder.on_device, decoder.on_cpu, len(free)) == (8, 0, 1)


def test_chunk_without_device_memory_is_decoded_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    images: list[bytes | None] = [*PLAIN.values(), None, *UNUSUAL.values()]
    decoder = make_decoder()
    monkeypatch.setattr(torch, "empty", fail)
    done, expected = (
        decoder(chunk_of(images)),
        decode_chunk(chunk_of(images), DecodeOptions(PREPROCESSOR, LIMIT)),
    )
    assert done.samples.equals(expected.samples)
    assert np.array_equal(done.pixels, expected.pixels)  # type: ignore[arg-type]
    assert (decoder.on_device, decoder.on_cpu) == (0, len(images) - 1)
    assert "the GPU is out of memory" in caplog.text


def test_device_out_of_memory_gets_smaller_batches() -> None:
    class ShortOfMemory(PillowJpegs):
        def __call__(self, files: list[bytes]) -> list[Tensor]:
            if len(files) > 2:
                self.batches.append(len(files))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(files)

    decode_jpegs = ShortOfMemory()
    decoder, images = make_decoder(decode_jpegs), [jpeg((50 + row, 60)) for row in range(8)]
    assert_as_on_the_cpu(decoder(chunk_of(images)), images)
    assert decode_jpegs.batches == [8, 4, 2, 2, 4, 2, 2]
    assert (decoder.on_device, decoder.on_cpu) == (8, 0)


def test_batches_are_limited_by_their_pixels() -> None:
    sizes = [(50, 50), (50, 50), (10, 10), (100, 50), (10, 10), (101, 50)]
    images = [jpeg(size) for size in sizes]
    decode_jpegs = PillowJpegs()
    decoder = make_decoder(decode_jpegs, max_batch_pixels=5000)
    assert_as_on_the_cpu(decoder(chunk_of(images)), images)
    assert decode_jpegs.batches == [2, 1, 1, 1]
    assert (decoder.on_device, decoder.on_cpu) == (5, 1)


def test_results_do_not_depend_on_the_batch() -> None:
    images = [*PLAIN.values(), *UNUSUAL.values()]
    together = make_decoder()(chunk_of(images))
    alone = [make_decoder()(chunk_of([image])).pixels for image in images]
    assert isinstance(together.pixels, Tensor)
    assert torch.equal(together.pixels, torch.cat(alone))  # type: ignore[arg-type]


def test_the_cpu_decodes_while_the_device_does() -> None:
    started = threading.Event()

    class Waiting(PillowJpegs):
        def __call__(self, files: list[bytes]) -> list[Tensor]:
            assert started.wait(10)
            return super().__call__(files)

    decoder, images = make_decoder(Waiting()), [encode(picture(), "PNG"), jpeg()]
    submit_to_cpu = decoder._cpu.submit

    def submit(*arguments: Any) -> Any:
        future = submit_to_cpu(*arguments)
        future.add_done_callback(lambda _: started.set())
        return future

    decoder._cpu.submit = submit  # type: ignore[method-assign]
    assert_as_on_the_cpu(decoder(chunk_of(images)), images)
    assert decoder.on_device == 1


@pytest.mark.parametrize("is_slow", [False, True])
def test_pixels_do_not_depend_on_the_speed_of_the_decoders(is_slow: bool) -> None:
    class Timed(PillowJpegs):
        def __call__(self, files: list[bytes]) -> list[Tensor]:
            time.sleep(0.3 * is_slow)
            return [255 - image for image in super().__call__(files)]  # unlike the pixels of the CPU

    images = [jpeg((40 + number, 50)) for number in range(40)]
    decoder = make_decoder(Timed(), cpu_share=0.4, threads=1 + 3 * is_slow)
    done = decoder(chunk_of(images))
    on_cpu = [is_for_cpu(data, 0.4) for data in images]
    assert (decoder.on_device, decoder.on_cpu) == (on_cpu.count(False), on_cpu.count(True))
    assert 8 <= decoder.on_cpu <= 24
    expected = decode_chunk(chunk_of(images), DecodeOptions(PREPROCESSOR, LIMIT)).pixels
    assert isinstance(done.pixels, Tensor)
    assert isinstance(expected, np.ndarray)
    for pixels, on_the_cpu, wanted in zip(done.pixels.numpy(), on_cpu, expected, strict=True):
        assert np.array_equal(pixels, wanted) == on_the_cpu


def test_two_chunks_can_be_decoded_concurrently() -> None:
    decoder = make_decoder()
    groups = [[*PLAIN.values()], [*UNUSUAL.values()], [*PLAIN.values()][::-1], [*UNUSUAL.values()][::-1]]
    with ThreadPoolExecutor(4) as pool:
        for done, images in zip(pool.map(decoder, map(chunk_of, groups)), groups, strict=True):
            assert_as_on_the_cpu(done, images)
    assert (decoder.on_device, decoder.on_cpu) == (2 * len(PLAIN), 2 * len(UNUSUAL))


@pytest.mark.parametrize("name", ["JPEG", "JPEG progressive"])
def test_damaged_headers_never_raise(name: str) -> None:
    chance = random.Random(name)
    for _ in range(300):
        data = bytearray(SAMPLES[name])
        for _ in range(chance.choice([1, 2, 8])):
            data[chance.randrange(min(len(data), chance.choice([64, 400, len(data)])))] = chance.randrange(
                256
            )
        parse_plain_jpeg(0, bytes(data), LIMIT)
        parse_plain_jpeg(0, bytes(data[: chance.randrange(len(data))]) + b"\xff\xd9", LIMIT)


def test_missing_torchvision_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"pip install 'cvt-label\[gpu\]'\), or set decode.device: cpu"):
        GpuDecoder(DecodeOptions(PREPROCESSOR, LIMIT), "cpu")


def replace_torchvision(monkeypatch: pytest.MonkeyPatch, decode: Any) -> None:
    """Replaces nvJPEG by `decode`, which is called as torchvision 0.26 documents."""

    def decode_jpeg(input: list[Tensor], mode: str, device: torch.device) -> list[Tensor]:
        assert all(file.dtype == torch.uint8 and file.dim() == 1 for file in input)
        assert (mode, device.type) == ("rgb", "cpu")
        images: list[Tensor] = decode([file.numpy().tobytes() for file in input])
        return images

    module: Any = types.ModuleType("torchvision.io")
    module.decode_jpeg, module.ImageReadMode = decode_jpeg, types.SimpleNamespace(RGB="rgb")
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.io", module)
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "synchronize", MagicMock())


def test_torchvision_is_called_with_valid_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_torchvision(monkeypatch, PillowJpegs())
    decoder, images = (
        CountingDecoder(DecodeOptions(PREPROCESSOR, LIMIT), "cpu"),
        [*PLAIN.values(), without_tables()],
    )
    assert_as_on_the_cpu(decoder(chunk_of(images)), images)
    assert decoder.on_device == len(PLAIN)


def test_torchvision_without_nvjpeg_is_rejected_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(files: list[bytes]) -> list[Tensor]:
        raise RuntimeError("torchvision not compiled with nvJPEG support")

    replace_torchvision(monkeypatch, fail)
    with pytest.raises(ValueError, match=r"not compiled with nvJPEG support\): .* or set decode.device: cpu"):
        GpuDecoder(DecodeOptions(PREPROCESSOR, LIMIT), "cpu")


@pytest.mark.parametrize(("index", "fill"), [(0, 0), (7, 0), (11, 255)])
def test_decoder_that_skips_an_image_is_rejected(
    monkeypatch: pytest.MonkeyPatch, index: int, fill: int
) -> None:
    def decode(files: list[bytes]) -> list[Tensor]:
        images = PillowJpegs()(files)
        images[index] = torch.full_like(images[index], fill)
        return images

    replace_torchvision(monkeypatch, decode)
    with pytest.raises(
        ValueError, match=r"can't decode JPEGs on 'cpu' \(a decoded image differs by \d+ gray levels"
    ):
        GpuDecoder(DecodeOptions(PREPROCESSOR, LIMIT), "cpu")


def test_photographs_are_plain_and_decoded_alike(photographs: list[tuple[str, bytes, int]]) -> None:
    preprocessor = Preprocessor.from_dict({"size": 224}, "test")
    images = [data for _, data, _ in photographs[:60]]
    decoder = CountingDecoder(DecodeOptions(preprocessor, 10**8), "cpu", PillowJpegs())
    done, expected = (
        decoder(chunk_of(images)),
        decode_chunk(chunk_of(images), DecodeOptions(preprocessor, 10**8)),
    )
    assert done.samples.equals(expected.samples)
    assert decoder.on_device > 0.9 * len(images)
    assert isinstance(done.pixels, Tensor)
    assert np.abs(done.pixels.numpy().astype(np.int16) - expected.pixels).mean() < 0.3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_nvjpeg_decodes_as_pillow_does() -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    images: list[bytes | None] = [*PLAIN.values(), None, *UNUSUAL.values(), without_tables()]
    decoder = CountingDecoder(DecodeOptions(PREPROCESSOR, LIMIT), "cuda")
    done, *others = [decoder(chunk_of(images)) for _ in range(3)]
    expected = decode_chunk(chunk_of(images), DecodeOptions(PREPROCESSOR, LIMIT))
    assert done.samples.equals(expected.samples)
    assert isinstance(done.pixels, Tensor)
    assert done.pixels.device.type == "cuda"
    assert all(torch.equal(done.pixels, other.pixels) for other in others)  # type: ignore[arg-type]
    assert np.abs(done.pixels.cpu().numpy().astype(np.int16) - expected.pixels).mean() < 3
    assert decoder.on_device >= 3 * (len(PLAIN) - 1)  # nvJPEG may reject the tiny image
