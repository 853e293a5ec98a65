"""What a hostile input can cost: outcome, peak memory and time, measured in a child process.

Each test is a row of docs/reference/hostile-inputs.md. Keep each test under two seconds.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pyarrow as pa
import pytest
from imagecodecs import jpegxl_encode
from PIL import ExifTags, Image

from cvt.checkpoints import read_labels
from cvt.errors import CheckpointError
from cvt.preprocessing import Preprocessor
from jobs.local_s3 import LocalS3
from pipeline.classify import classify
from pipeline.commit import Partition, PredictionWriter
from pipeline.commit.prediction_files import OpenShard
from pipeline.decode import DecodeOptions, decode, decode_chunk
from pipeline.decode.bounds import BYTES_PER_PIXEL
from pipeline.decode.cpu import child_decoders
from pipeline.predictions import PredictionOptions
from pipeline.read import ReadOptions, read_samples, split_into_chunks
from pipeline.storage import Storage, StorageError, retrying
from tests.cvt.checkpoints import hostile
from tests.fault_proxy import FaultProxy
from tests.makers import list_shards, make_parquet
from tests.measuring import Measured, measure
from tests.read_options import read_options

MIB = 1024**2

pillow_heif.register_heif_opener()

PREPROCESSOR = Preprocessor.from_dict({"size": 32}, "test")


# --- images ----------------------------------------------------------------------------------------

#: Width and height of the images whose memory is measured, and the image of this size.
SIDE = 1500
NOISE = Image.effect_noise((SIDE, SIDE), 100)
SIDEWAYS = Image.Exif()
SIDEWAYS[ExifTags.Base.Orientation] = 6


def decode_image(data: bytes, max_pixels: int = 178_956_970, timeout_s: float = 60) -> str | None:
    """Decodes an image as the stage does, in this process; returns its error."""
    child_decoders.clear()
    return decode(data, DecodeOptions(PREPROCESSOR, max_pixels, timeout_s=timeout_s)).error


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def color(mode: str) -> Image.Image:
    return Image.merge("RGB", [NOISE] * 3).convert(mode)


def transparent() -> Image.Image:
    image = color("RGB")
    image.putalpha(NOISE)
    return image


def gray_16_bit() -> Image.Image:
    return Image.fromarray(np.asarray(NOISE).astype(np.uint16) * 257)


@pytest.mark.parametrize(
    ("make", "bytes_per_pixel"),
    [
        (lambda: encode(color("CMYK"), "JPEG", progressive=True, subsampling=0, exif=SIDEWAYS), 13),
        (lambda: encode(color("RGB"), "JPEG", subsampling=0)[:-2], 13),
        (lambda: encode(color("RGBA"), "PNG", compress_level=1, exif=SIDEWAYS), 13),
        (lambda: encode(gray_16_bit(), "PNG", compress_level=1, exif=SIDEWAYS), 13),
        (lambda: encode(color("RGB"), "PNG", compress_level=1, save_all=True, append_images=[NOISE]), 13),
        (lambda: encode(color("RGBA"), "WEBP", lossless=True, quality=0, method=0, exif=SIDEWAYS), 18),
        (lambda: encode(color("RGB"), "WEBP", save_all=True, append_images=[NOISE], method=0), 18),
        (lambda: encode(color("P"), "GIF", save_all=True, append_images=[color("P").rotate(90)]), 13),
        (lambda: encode(color("RGBA"), "BMP"), 13),
        (lambda: encode(NOISE.convert("F"), "TIFF", compression="zstd", tiffinfo={278: SIDE}), 13),
        (lambda: encode(color("RGBA"), "TIFF", compression="zstd", tiffinfo={278: SIDE}), 13),
        (lambda: encode(transparent(), "AVIF", subsampling="4:4:4", speed=10), 15),
        (lambda: encode(transparent(), "HEIF", chroma=444, enc_params={"preset": "ultrafast"}), 15),
        (lambda: jpegxl_encode(np.asarray(transparent()), lossless=True, effort=1), 18),
    ],
    ids=[
        "JPEG",
        "JPEG-without-end",
        "PNG",
        "PNG-16",
        "APNG",
        "WebP",
        "WebP-frames",
        "GIF",
        "BMP",
        "TIFF-float",
        "TIFF",
        "AVIF",
        "HEIF",
        "JPEG-XL",
    ],
)
def test_memory_of_an_image_follows_from_its_pixels(make: Callable[[], bytes], bytes_per_pixel: int) -> None:
    data = make()
    measured = measure(decode_image, data)
    assert measured.outcome is None
    pixels = SIDE * SIDE
    assert pixels < measured.peak < bytes_per_pixel * pixels + 3 * len(data) + 8 * MIB
    assert bytes_per_pixel <= BYTES_PER_PIXEL


def test_image_over_the_pixel_limit_is_not_decoded() -> None:
    measured = measure(decode_image, encode(Image.new("1", (40_000, 20_000)), "PNG"))
    assert "dimensions too large: 40000 x 20000 pixels" in measured.outcome
    assert measured.peak < 4 * MIB
    assert measured.seconds < 0.5


def test_webp_canvas_over_the_limit_costs_no_memory() -> None:
    small = color("RGB").resize((64, 64))
    data = bytearray(encode(small, "WEBP", save_all=True, append_images=[small.rotate(90)]))
    data[24:30] = (12_999).to_bytes(3, "little") * 2
    measured = measure(decode_image, bytes(data), max_pixels=10**8)
    assert "dimensions too large: 13000 x 13000 pixels" in measured.outcome
    assert measured.peak < 4 * len(data) + 8 * MIB


def tiff(fields: list[tuple[int, int, int, int]], extra: bytes = b"") -> bytes:
    """A TIFF of one directory: fields of tag, type, count and value; `extra` starts at the offset 4096."""
    entries = b"".join(struct.pack("<HHII", *field) for field in sorted(fields))
    return (struct.pack("<2sHIH", b"II", 42, 8, len(fields)) + entries).ljust(4096, b"\0") + extra


def test_tile_larger_than_its_tiff_is_not_decoded() -> None:
    size, tile = ((256, 4, 1, 64), (257, 4, 1, 64)), ((322, 4, 1, 30_000), (323, 4, 1, 24_000))
    data = tiff(
        [*size, *tile, (258, 3, 1, 8), (259, 3, 1, 5), (262, 3, 1, 1), (324, 4, 1, 8), (325, 4, 1, 90)]
    )
    measured = measure(decode_image, data)
    assert "dimensions too large: 30000 x 24000 pixels" in measured.outcome
    assert measured.peak < 4 * MIB


def test_tiff_with_millions_of_strips_is_not_decoded() -> None:
    strips = 3_000_000
    fields = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (262, 3, 1, 1), (278, 4, 1, 1)]
    data = tiff([*fields, (273, 4, strips, 4096)], bytes(4 * strips))
    measured = measure(decode_image, data)
    assert measured.outcome == "cannot decode: TIFF: more than 262144 segments, strips, tiles or other values"
    assert measured.peak < 4 * MIB


def jpeg_of_many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose scans contain almost nothing; a decoder processes all pixels for each."""
    data = encode(Image.new("L", (16, 16)), "JPEG", progressive=True)
    frame, scan = data.index(b"\xff\xc2"), data.index(b"\xff\xda")
    header = data[: frame + 5] + struct.pack(">HH", side, side) + data[frame + 9 : scan]
    baseline = encode(Image.new("L", (16, 16)), "JPEG")
    tables = baseline[baseline.index(b"\xff\xc4") : baseline.index(b"\xff\xda")]
    first, other = (b"\xff\xda\0\x08\x01\x01\0" + bytes(band) + b"\0\0" for band in ((0, 0), (1, 63)))
    return header + tables + first + other * scans + b"\xff\xd9"


def test_image_that_takes_long_ends_soon_after_its_timeout() -> None:
    data = jpeg_of_many_scans(4000, 150_000)
    measured = measure(decode_image, data, timeout_s=0.3)
    assert measured.outcome == "cannot decode: JPEG: decoding took more than 0.3 s (decode.timeout_s)"
    assert measured.peak < 4000 * 4000 * BYTES_PER_PIXEL
    assert measured.seconds < 10  # on a loaded machine


@pytest.mark.parametrize("case", ["jpeg-segments", "jpeg-exif"])
def test_parts_of_a_jpeg_have_limited_memory(case: str) -> None:
    data = encode(Image.new("L", (16, 16)), "JPEG")
    if case == "jpeg-segments":
        data = data[:2] + b"\xff\xe5\0\x02" * 300_000 + data[2:]
    else:  # the orientation is a list of millions of numbers
        count = 6 * 65_000
        exif = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 274, 3, count * 8, 26) + bytes(4 + 16 * count)
        parts = [exif[start : start + 65_000] for start in range(0, len(exif), 65_000)]
        segments = [b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts]
        data = data[:2] + b"".join(segments) + data[2:]
    measured = measure(decode_image, data)
    limit = "cannot decode: JPEG: more than 262144 segments, strips, tiles or other values"
    assert measured.outcome == (limit if case == "jpeg-segments" else None)
    assert measured.peak < 6 * len(data) + 8 * MIB


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    "chunks",
    [
        png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(50_000_000))),
        png_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(50_000_000))),
        b"".join(png_chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(900_000))) for i in range(99)),
        png_chunk(b"abCd", b"") * 1_000_000,
    ],
    ids=["profile", "text", "texts", "chunks"],
)
def test_png_with_much_metadata_is_labeled(chunks: bytes) -> None:
    data = encode(Image.new("L", (16, 16)), "PNG")
    data = data[:33] + chunks + data[33:]
    measured = measure(decode_image, data)
    assert measured.outcome is None
    assert measured.peak < 80 * MIB + 3 * len(data)
    assert measured.seconds < 5  # on a loaded machine


# --- shards ----------------------------------------------------------------------------------------


def read_shard(uri: str, **options: Any) -> tuple[set[str | None], str | None]:
    """Reads a shard in chunks; returns the errors of its samples, and that of the shard."""
    [shard] = list_shards(Storage(), uri)
    errors, error = set[str | None](), None
    for chunk in split_into_chunks(
        read_samples(Storage(), shard, read_options(**options)), 0, 1024, 128 * MIB
    ):
        assert chunk.samples.nbytes < 2 * 128 * MIB
        error = chunk.error
        errors |= set(chunk.samples["error"].to_pylist())
    return errors, error


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def extended(content: bytes, kind: bytes) -> bytes:
    return header("x", len(content), kind) + content + bytes(-len(content) % 512)


def gzipped(*parts: bytes | tuple[bytes, int]) -> bytes:
    """Compresses each part, and repeats it: files of gzip can be concatenated."""
    pairs = (part if isinstance(part, tuple) else (part, 1) for part in parts)
    return b"".join(gzip.compress(part, 6, mtime=0) * times for part, times in pairs)


def long_names(count: int, size: int) -> bytes:
    member = extended(b"n" * size + b".jpg", tarfile.GNUTYPE_LONGNAME) + header("x.jpg")
    return gzipped((member, count), bytes(1024))


def sparse_map() -> bytes:
    first = bytearray(header("a.jpg", 0, tarfile.GNUTYPE_SPARSE))
    first[482] = 1
    first[148:156] = b" " * 8
    first[148:156] = b"%06o\0 " % sum(first)
    return gzipped(bytes(first), ((bytes(504) + b"\1" + bytes(7)) * 2048, 500))


def empty_groups(columns: int, groups: int, chunks: int) -> bytes:
    """A file of a footer only, with row groups of empty column chunks, in Thrift's compact protocol."""

    def number(value: int) -> bytes:
        return bytes([value >> shift & 127 | 128 for shift in (0, 7)]) + bytes([value >> 14])

    group = b"\x19\xfc" + number(chunks) + b"\x26\0\0" * chunks + b"\x16\0\x16\0\0"
    schema = b"\x48\1r\x15" + number(2 * columns) + b"\0" + b"\x15\x0c\x25\0\x18\5image\0"
    schema += b"\x15\2\x25\0\x18\1x\0" * (columns - 1)
    footer = b"\x15\2\x19\xfc" + number(columns + 1) + schema
    footer += b"\x16\0\x19\xfc" + number(groups) + group * groups + b"\0"
    return b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"


def same_value(size: int, column: str = "image", rows: int = 16) -> bytes:
    """A file of some kilobytes whose rows refer to one large value of a dictionary."""
    values = pa.DictionaryArray.from_arrays(pa.array([0] * rows), pa.array([bytes(size)]))
    return make_parquet({"image": [b"i"] * rows} | {column: values}, compression="zstd")


def json_label() -> bytes:
    content = b'{"y": 1, "x": [' + b"{}," * 1_390_000 + b"0]}"
    label = header("a.json", len(content)) + content + bytes(-len(content) % 512)
    return gzipped(header("a.jpg"), label, bytes(1024))


ZEROS = bytes(16 * MIB)
SMALL = 64  # MiB, of which a process needs 50 to read any file
#: Maker of the file, options, part of the error, MiB.
HOSTILE: dict[str, tuple[Callable[[], bytes], dict[str, Any], str, int]] = {
    "names.tar.gz": (lambda: long_names(20, 10 * MIB), {}, "have more than 1 MiB", SMALL),
    "keys.tar.gz": (lambda: long_names(100, 1_000_000), {}, "invalid key: the key has more than", SMALL),
    "pax.tar.gz": (lambda: gzipped(header("x", 2**30, b"x"), (ZEROS, 64)), {}, "have more than 1 MiB", SMALL),
    "sparse.tar.gz": (sparse_map, {}, "have more than 1 MiB", SMALL),
    "records.tar.gz": (lambda: gzipped(extended(b"2 " * 500_000 + b"=", b"x")), {}, "PAX record", SMALL),
    "json.tar.gz": (json_label, {"label_field": "y"}, "", SMALL + 100),
    "folders.tar.gz": (
        lambda: gzipped((header("folder", 0, tarfile.DIRTYPE) * 10_000, 500), bytes(1024)),
        {"timeout_s": 0.5},
        "reading one sample took more than 0.5 s",
        SMALL,
    ),
    "zeros.tar.gz": (
        lambda: gzipped(bytes(1024), (ZEROS, 500)),
        {"timeout_s": 0.5},
        "reading one sample took more than 0.5 s",
        SMALL,
    ),
    "value.parquet": (
        lambda: same_value(20 * MIB),
        {"max_image_bytes": MIB},
        "file too large",
        SMALL + 5 * 20,
    ),
    "key.parquet": (lambda: same_value(20 * MIB, "k"), {"key_column": "k"}, "invalid key", SMALL + 5 * 20),
    **{
        f"{role}s.parquet": (
            lambda role=role: same_value(20 * MIB, role, 20_000),
            {f"{role}_column": role, "max_image_bytes": MIB},
            f"column '{role}' has too many long values",
            SMALL + 5 * 20,
        )
        for role in ("image", "key", "label")
    },
    "nulls.parquet": (
        lambda: make_parquet({"image": pa.nulls(5_000_000, pa.binary())}),
        {},
        "more than 1,000,000 samples (read.max_shard_samples)",
        SMALL,
    ),
    "empty.tar.gz": (
        lambda: gzipped((header("x.jpg") * 5000, 20), bytes(1024)),
        {"max_shard_samples": 5000},
        "more than 5,000 samples (read.max_shard_samples)",
        SMALL,
    ),
    "page.parquet": (
        lambda: same_value(9 * MIB),
        {"max_page_bytes": 8 * MIB},
        "raise read.max_page_bytes",
        SMALL,
    ),
    "chunks.parquet": (lambda: empty_groups(1, 1, 340_000), {}, "", SMALL + 250),
    "groups.parquet": (lambda: empty_groups(20_000, 500, 1), {}, "", SMALL + 40),
    "footer.parquet": (lambda: bytes(17 * MIB) + b"\0\0\x10\1PAR1", {}, "the footer has", SMALL),
}


@pytest.mark.skipif("sys.platform != 'linux'")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_shard_costs_its_bound_at_most(name: str, tmp_path: Path) -> None:
    make, options, error, mib = HOSTILE[name]
    (tmp_path / name).write_bytes(make())
    measured = measure(read_shard, str(tmp_path / name), **options)
    errors, shard_error = measured.outcome
    found = shard_error or "".join(map(str, errors - {None}))
    assert error in found if error else not found, measured
    assert measured.peak < mib * MIB
    assert measured.seconds < 5  # a loaded machine takes several times as long


def label_empty_images(uri: str, output: str) -> int | None:
    """Labels a shard without images, as the driver without Ray; returns the number of rows."""
    [shard] = list_shards(Storage(), uri)
    options, arrived = PredictionOptions(["cat"], 1, "none", 384), OpenShard()
    for chunk in split_into_chunks(read_samples(Storage(), shard, ReadOptions()), 0, 128, 128 * MIB):
        decoded = decode_chunk(chunk, DecodeOptions(PREPROCESSOR, 10**8))
        arrived.add(classify(decoded, lambda pixels: pytest.fail("no pixels"), options))
    partition = Partition(Storage(), output, options.labels)
    writer = PredictionWriter(partition, "f" * 64, options, "run", {}, lambda shard: True)
    return writer.commit(shard, arrived).row.rows


@pytest.mark.skipif("sys.platform != 'linux'")
def test_sample_costs_the_driver_a_kilobyte_at_most(tmp_path: Path) -> None:
    peaks = []
    for count in (1000, 16_000):
        path = tmp_path / f"{count}.tar.gz"
        path.write_bytes(gzip.compress(b"".join(header(f"{i}.jpg") for i in range(count)) + bytes(1024), 1))
        measured = measure(label_empty_images, str(path), str(tmp_path / "out"))
        assert measured.outcome == count
        peaks.append(measured.peak)
    assert peaks[1] - peaks[0] < 1000 * 15_000 + 4 * MIB  # buffers of the Parquet writer


# --- storage ---------------------------------------------------------------------------------------


def use_store(environment: dict[str, str], endpoint: str, operation: str, uri: str, timeout_s: float) -> str:
    """Reads, lists or describes an object of a store without pauses between attempts; returns the error."""
    os.environ |= environment
    retrying.MAX_PAUSE_S = 0
    storage = Storage(endpoint_url=endpoint, request_timeout_s=timeout_s)
    actions = {
        "read": lambda: storage.read(uri, "0123456789abcdef-1000"),
        "list": lambda: list(storage.list_folders(uri)),
        "lease": lambda: storage.read_latest(uri, io.BufferedReader.read, 64 * 1024),
    }
    try:
        return repr(actions[operation]())
    except StorageError as error:
        return str(error)


#: The S3 client library itself takes 60 MB.
STORE_BYTES = 96 * MIB


@pytest.mark.parametrize(
    ("kind", "operation", "outcome"),
    [
        ("drip", "read", "too slow"),
        ("drip", "list", "too slow"),
        ("drip_body", "list", "too slow"),
        ("flood", "list", "the response has more than 4,194,304 bytes"),
        ("flood", "read", "failed after retries|no longer the expected version"),
        ("flood", "lease", "has 1,000,000,000,000 bytes, more than the limit of 65,536 bytes"),
        pytest.param("entity_bomb", "list", "500|failed after retries", marks=pytest.mark.slow),
        ("same_token", "list", "the store's listing of bucket '.*' is invalid"),
    ],
)
def test_hostile_store_costs_no_more_than_its_limits(
    s3_server: LocalS3, bucket: str, kind: str, operation: str, outcome: str
) -> None:
    Storage(endpoint_url=s3_server.endpoint_url).write(f"{bucket}/x/y", bytes(1000))
    uri = bucket if operation == "list" else f"{bucket}/x/y"
    timeout_s = 0.1 if kind.startswith("drip") else 10
    with FaultProxy(s3_server.endpoint_url) as proxy:
        proxy.always(kind)
        measured: Measured = measure(use_store, s3_server.environment(), proxy.url, operation, uri, timeout_s)
    assert re.search(outcome, measured.outcome)
    assert measured.peak < STORE_BYTES
    assert measured.seconds < 15  # on a busy machine


# --- model files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (hostile.many_classes, "config.json: the number of classes is 1000000000, not 1 to 100,000"),
        (hostile.many_names, "config.json: the file has more than 8,388,608 bytes"),
        (hostile.long_label, "config.json: id2label: the name of class 0 has more than 1,024 bytes"),
        (hostile.many_layers, "depth[2]: Input should be less than or equal to 256, not 10000000"),
        (hostile.wide_tokens, "embed_dim[2]: Input should be less than or equal to 16384, not"),
        (hostile.large_tokens, "weights do not fit the configuration: missing: "),
        (hostile.nested_json, "config.json: maximum recursion depth exceeded while decoding a JSON"),
        (hostile.many_lists, "config.json: the file has more than 450,000 commas, colons and brackets"),
        (hostile.many_keys, "config.json: the file has more than 450,000 commas, colons and brackets"),
        (hostile.many_stages, "config.json: CvtConfig: embed_dim has more than 256 entries"),
        (hostile.nested_value, "config.json: CvtConfig: embed_dim"),
        (hostile.large_pixels, "preprocessor_config.json: size: Input should be less than or equal to 2048"),
        (hostile.narrow_crop, "crop_pct: Input should be greater than or equal to 0.1, not 1e-09"),
        (hostile.many_tokens, "stage 0 has 2048 x 2048 tokens of width 32"),
        (hostile.long_header, "model.safetensors: the header has 9,000,000 bytes, more than 8,388,608"),
        (hostile.many_tensors, "model.safetensors: the header has more than 10,000 objects"),
        (hostile.many_shards, "with a weight_map: more than 10,000 names"),
        (hostile.calls_bytearray, "pytorch_model.bin: the file is damaged, or has Python objects other than"),
        (hostile.calls_tensor, "pytorch_model.bin: the file is damaged, or has Python objects other than"),
        (hostile.calls_storage, "pytorch_model.bin: the file is damaged, or has Python objects other than"),
        (hostile.inflated_entry, "pytorch_model.bin: an entry is compressed"),
        (hostile.expanded_tensor, "the weights have 3,280,091,320 bytes, but the file has only"),
        (hostile.storage_beyond_the_file, "pytorch_model.bin: "),
        (hostile.truncated_string, "pytorch_model.bin: expected 1000000000 bytes in a unicodestring4"),
        (hostile.many_pickled_lists, "a/data.pkl has 5,000,003 bytes, more than 4,194,304"),
        (hostile.many_pickle_operations, "a/data.pkl has more than 250,000 operations"),
        (hostile.long_entry_list, "the list of entries has 10,092,000 bytes, more than 4,194,304"),
        (hostile.many_rows_without_columns, "the number of classes is 1000000000000, not 1 to 100,000"),
        (
            hostile.compressed_dataset,
            "tf_model.h5: a/b/c/kernel:0: the file does not contain the 6,400,000,000",
        ),
        (
            hostile.unwritten_dataset,
            "tf_model.h5: a/b/c/kernel:0: the file does not contain the 6,400,000,000",
        ),
        (hostile.many_groups, "tf_model.h5: more than 10,000 groups and datasets"),
        (hostile.shared_strings_dataset, "tf_model.h5: a/b/c/kernel:0: not the dataset of a weight"),
        (hostile.external_dataset, "tf_model.h5: a/b/c/kernel:0: the file does not contain the 400 bytes"),
        (hostile.linked_groups, "weights do not fit the configuration: missing: "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.skipif("sys.platform != 'linux'")
def test_model_file_costs_at_most_its_size(
    make: Callable[[Path], str | None], message: str, tmp_path: Path
) -> None:
    if make.__name__.endswith(("dataset", "groups")):
        pytest.importorskip("h5py", reason="needs the extra `keras`")
    folder = hostile.bundled(tmp_path / "model")
    measured = measure(hostile.load, str(folder / (make(folder) or "")))
    assert isinstance(measured.outcome, CheckpointError)
    assert message in str(measured.outcome)
    assert measured.peak < 64 * MIB
    assert measured.seconds < 5


@pytest.mark.parametrize("name", ["classes.txt", "classes.json"])
@pytest.mark.skipif("sys.platform != 'linux'")
def test_file_of_class_names_is_read_up_to_its_limit(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(10**10)
    measured = measure(read_labels, tmp_path / name)
    assert f"labels {tmp_path / name}: the file has more than 8,388,608 bytes" in str(measured.outcome)
    assert measured.peak < 32 * MIB
    assert measured.seconds < 5


@pytest.mark.parametrize("kind", hostile.KINDS)
@pytest.mark.skipif("sys.platform != 'linux'")
def test_randomly_changed_model_files_raise_only_checkpoint_errors(tmp_path: Path, kind: str) -> None:
    if kind == "tensorflow":
        pytest.importorskip("h5py", reason="needs the extra `keras`")
    measured = measure(hostile.escaped_errors, kind, str(tmp_path), 15)
    assert measured.outcome == []
    assert measured.exit_code == 0
    assert measured.peak < 128 * MIB
