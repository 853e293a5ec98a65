from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from pipeline.predictions import ErrorCategory, sample_error
from pipeline.read import Chunk, Sample, split_into_chunks
from pipeline.read.samples import ShardError


def samples(count: int, size: int = 10) -> list[Sample]:
    return [Sample(f"k{i}", bytes(size), i) for i in range(count)]


def split(items: object, images: int = 4, size: int = 10**6) -> list[Chunk]:
    return list(split_into_chunks(items, 7, images, size))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9])
def test_chunks_cover_the_shard_and_the_last_has_the_total(count: int) -> None:
    chunks = split(samples(count))
    starts = [chunk.start for chunk in chunks]
    lengths = [chunk.samples.num_rows for chunk in chunks]
    assert starts == [sum(lengths[:i]) for i in range(len(lengths))]
    assert sum(lengths) == count
    assert max(lengths) <= 4
    assert [chunk.total for chunk in chunks] == [None] * (len(chunks) - 1) + [count]
    assert all(chunk.error is None and chunk.shard == 7 for chunk in chunks)


def test_chunk_ends_before_the_limit_of_bytes() -> None:
    chunks = split(samples(6, size=100), images=100, size=250)
    assert [chunk.samples.num_rows for chunk in chunks] == [2, 2, 2]


def test_image_larger_than_the_limit_is_a_single_chunk() -> None:
    chunks = split([Sample("a", b"1"), Sample("b", bytes(500)), Sample("c", b"1")], size=250)
    assert [chunk.samples["key"].to_pylist() for chunk in chunks] == [["a"], ["b"], ["c"]]


def test_last_chunk_of_an_unreadable_shard_has_the_error() -> None:
    def broken() -> Iterator[Sample]:
        yield from samples(5)
        raise ShardError("s3://b/x.tar", "truncated")

    chunks = split(broken())
    assert [chunk.samples.num_rows for chunk in chunks] == [4, 0]
    assert chunks[-1].total == 4
    assert chunks[-1].error == "s3://b/x.tar: truncated"


def test_last_chunk_of_a_kept_shard_has_the_damage_and_all_samples() -> None:
    def broken() -> Iterator[Sample]:
        yield from samples(5)
        raise ShardError("s3://b/x.tar", "truncated", keep=True)

    chunks = split(broken())
    assert [chunk.samples.num_rows for chunk in chunks] == [4, 1]
    [restored] = Chunk.from_block(chunks[-1].to_block())
    assert (restored.total, restored.error, restored.damage) == (5, None, "s3://b/x.tar: truncated")


def test_keys_and_messages_count_toward_the_limit_of_bytes() -> None:
    error = sample_error(ErrorCategory.NO_IMAGE, "x" * 80)
    key = "k" * 100
    items = [Sample(key, b""), Sample(key, b"", unmatched="u" * 100), Sample("k", None, error=error)]
    assert [chunk.samples.num_rows for chunk in split(items * 2, 100, 250)] == [1, 1, 2, 1, 1]
    assert {chunk.encoded_bytes for chunk in split(items)} == {0}


def test_samples_that_arrow_refuses_are_the_error_of_the_shard() -> None:
    first, last = split([Sample("a", b"1"), Sample("b", b"2", target=2**40)], images=1)
    assert (first.samples["key"].to_pylist(), first.error) == (["a"], None)
    assert (last.samples.num_rows, last.total, last.transient) == (0, 1, False)
    assert "cannot store samples: " in (last.error or "")


def test_lack_of_memory_is_transient_and_names_the_shard() -> None:
    def samples() -> Iterator[Sample]:
        yield Sample("a", b"1")
        raise MemoryError

    (last,) = split_into_chunks(samples(), 0, 9, 9, "s3://b/x.tar")
    assert (last.samples.num_rows, last.total, last.transient) == (0, 0, True)
    assert last.error == "s3://b/x.tar: cannot store samples: MemoryError()"


def test_chunk_is_restored_from_a_block() -> None:
    [chunk] = split(
        [
            Sample("a", b"image", 3),
            Sample("b", None, None, sample_error(ErrorCategory.NO_IMAGE, "the row has no image bytes")),
        ]
    )
    block = chunk.to_block()
    assert block.num_rows == 1
    [restored] = Chunk.from_block(block)
    assert restored == chunk


def test_pixels_are_restored_from_a_block(tmp_path: object) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 5, 3), np.uint8)
    table = pa.table({"key": ["a", "b", "c"]})
    block = Chunk(1, 0, table, pixels=pixels).to_block()
    [restored] = Chunk.from_block(block)
    assert restored.pixels is not None
    np.testing.assert_array_equal(restored.pixels, pixels)


def test_empty_pixels_are_restored_from_a_block() -> None:
    pixels = np.empty((0, 5, 5, 3), np.uint8)
    [restored] = Chunk.from_block(Chunk(1, 0, pa.table({"key": ["a"]}), pixels=pixels).to_block())
    assert restored.pixels is not None
    assert restored.pixels.shape == (0, 5, 5, 3)


def test_block_of_several_chunks_yields_each_chunk() -> None:
    chunks = split(samples(10))
    block = pa.concat_tables([chunk.to_block() for chunk in chunks])
    assert list(Chunk.from_block(block)) == chunks


def test_empty_block_has_no_chunks() -> None:
    assert list(Chunk.from_block(pa.table({}))) == []
