"""Every sample error is `<category>: <detail>`, whichever stage produced the error."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from cvt.inference import EngineOutput
from cvt.preprocessing import Preprocessor
from pipeline.classify import classify
from pipeline.decode import DecodeOptions, decode
from pipeline.decode.cpu import MAX_SIDE
from pipeline.predictions import ErrorCategory, PredictionOptions, download_error, sample_error
from pipeline.read import Chunk, ReadOptions, read_samples
from pipeline.storage import Storage, StorageError
from tests.http_server import Answer, HttpServer
from tests.makers import category_of, list_shards, make_image, make_parquet, make_tar
from tests.read_options import read_options

Producer = Callable[[Path], str | None]
JPEG = make_image(1, (200, 150))


def read(name: str, data: bytes, options: ReadOptions | None = None, change: str = "") -> Producer:
    """Reads one sample; after the listing, `change` replaces or deletes the file."""

    def produce(folder: Path) -> str | None:
        storage, uri = Storage(), f"{folder}/{name}"
        storage.write(uri, data)
        [shard] = list_shards(storage, str(folder))
        if change == "replace":
            storage.write(uri, b"other")
        elif change == "delete":
            storage.delete(uri)
        [sample] = read_samples(storage, shard, options or ReadOptions())
        assert sample.image is None
        return sample.error

    return produce


def table(line: str) -> Producer:
    """Reads the row of a table with one line."""

    def produce(folder: Path) -> str | None:
        (folder / "uris.txt").write_text(line)
        [shard] = list_shards(Storage(), str(folder), "table")
        [sample] = read_samples(Storage(), shard, ReadOptions())
        return sample.error

    return produce


def tar(*members: tuple[str, bytes], **options: object) -> Producer:
    return read("x.tar", make_tar(members), read_options(**options))  # type: ignore[arg-type]


def linked_image() -> Producer:
    """A tar whose image is a symbolic link."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return read("x.tar", stream.getvalue())


def downloaded(answer: Answer) -> Producer:
    """Downloads an image of at most 9 bytes from an HTTP server."""

    def produce(_: Path) -> str | None:
        with HttpServer() as server, Storage(request_timeout_s=0.2).downloader() as downloader:
            with pytest.raises(StorageError) as caught:
                downloader.download(server.add("/a.jpg", answer), 9).result()
            return download_error(caught.value)

    return produce


def decoded(data: bytes, max_pixels: int = 10**6) -> Producer:
    return lambda _: (
        decode(data, DecodeOptions(Preprocessor.from_dict({"size": 32}, "test"), max_pixels)).error
    )


def classified(value: float | Exception) -> Producer:
    """Classifies one white image with a model that returns `value`, or raises it."""

    def backend(images: np.ndarray) -> EngineOutput:
        if isinstance(value, Exception) and images.any():
            raise value
        logit = 0.0 if isinstance(value, Exception) else value
        return EngineOutput(np.full((len(images), 3), logit, np.float32), np.zeros((len(images), 1)))

    def produce(_: Path) -> str | None:
        samples = pa.table({"key": ["a"], "error": pa.nulls(1, pa.string())})
        chunk = Chunk(0, 0, samples, pixels=np.full((1, 4, 4, 3), 255, np.uint8))
        options = PredictionOptions(("a", "b", "c"), 1, "none", 1)
        [error] = classify(chunk, backend, options).samples["error"].to_pylist()
        assert error is None or isinstance(error, str)
        return error

    return produce


C = ErrorCategory
PRODUCERS: list[tuple[ErrorCategory, Producer]] = [
    (C.INVALID_KEY, tar(("k" * 5000 + ".jpg", JPEG))),
    (
        C.INVALID_KEY,
        read("x.parquet", make_parquet({"image": [JPEG], "k": [[1]]}), read_options(key_column="k")),
    ),
    (C.INVALID_URI, table("ftp://host/a.jpg")),
    (C.IMAGE_NOT_FOUND, table("missing.jpg")),
    (C.NO_IMAGE, tar(("a.psd", b"?"))),
    (C.NO_IMAGE, read("x.parquet", make_parquet({"image": pa.array([None], pa.binary())}))),
    (C.IMAGE_NOT_FOUND, read("a.jpg", JPEG, change="delete")),
    (C.IMAGE_CHANGED, read("a.jpg", JPEG, change="replace")),
    (C.IMAGE_NOT_FOUND, downloaded(Answer(status=404))),
    (C.ACCESS_DENIED, downloaded(Answer(status=403))),
    (C.DOWNLOAD_FAILED, downloaded(Answer(status=400))),
    (C.DOWNLOAD_FAILED, downloaded(Answer(delay_s=1))),
    (C.FILE_TOO_LARGE, downloaded(Answer(b"0123456789"))),
    (C.UNREADABLE_IMAGE, linked_image()),
    (C.FILE_TOO_LARGE, tar(("a.jpg", JPEG), max_image_bytes=9)),
    (C.FILE_TOO_LARGE, read("x.parquet", make_parquet({"image": [JPEG]}), read_options(max_image_bytes=9))),
    (C.FILE_TOO_LARGE, read("a.jpg", JPEG, read_options(max_image_bytes=9))),
    (C.INVALID_CARRIED_VALUE, tar(("a.jpg", JPEG), ("a.json", b'{"n": "?"}'), carry={"n": "int64"})),
    (C.EMPTY_IMAGE, decoded(b"")),
    (C.UNSUPPORTED_FORMAT, decoded(b"<html>: not an image")),
    (C.DIMENSIONS_TOO_LARGE, decoded(JPEG, max_pixels=9)),
    (C.DIMENSIONS_TOO_LARGE, decoded(make_image(0, (MAX_SIDE + 1, 1), "PNG"), max_pixels=2 * MAX_SIDE)),
    (C.CANNOT_DECODE, decoded(JPEG[:-200])),
    (C.CANNOT_DECODE, decoded(make_image(1, (200, 150), "PNG")[:100])),
    (C.CANNOT_DECODE, decoded(b"BM: 1")),
    (C.MODEL_FAILED, classified(RuntimeError("shape: 3\nmismatch"))),
    (C.NON_FINITE_OUTPUT, classified(np.nan)),
    (C.NON_FINITE_OUTPUT, classified(np.inf)),
]


@pytest.mark.parametrize(("category", "produce"), PRODUCERS)
def test_error_starts_with_its_category(category: ErrorCategory, produce: Producer, tmp_path: Path) -> None:
    error = produce(tmp_path)
    assert category_of(error) is category
    assert len((error or "").splitlines()) == 1


def test_every_category_has_a_producer() -> None:
    assert {category for category, _ in PRODUCERS} == set(ErrorCategory)


@pytest.mark.parametrize("category", ErrorCategory)
def test_category_has_no_colon_and_no_digit(category: ErrorCategory) -> None:
    assert category.replace("-", " ").replace(" ", "").isalpha()
    assert category == category.strip().lower()


def test_sql_groups_errors_by_category() -> None:
    categories = [C.NO_IMAGE, C.CANNOT_DECODE, C.NO_IMAGE]
    errors = [sample_error(category, f"'a: {i}' is {i}") for i, category in enumerate(categories)]
    labels = pa.table({"error": [None, *errors]})
    query = (
        "SELECT split_part(error, ':', 1), count(*) FROM labels WHERE error IS NOT NULL GROUP BY 1 ORDER BY 1"
    )
    with duckdb.connect() as connection:
        connection.register("labels", labels)
        assert connection.execute(query).fetchall() == [("cannot decode", 1), ("no image", 2)]
