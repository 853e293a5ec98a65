from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from pipeline.read import Chunk, Sample, split_into_chunks
from pipeline.read.samples import ShardError


def samples(count: int, size: int = 10) -> list[Sample]:
    return [Sample(f"k{i}", bytes(size), i) for i in range(count)]


def cut(items: object, images: int = 4, size: int = 10**6) -> list[Chunk]:
    return list(split_into_chunks(items, 7, images, size))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9])
def test_chunks_cover_the_shard_without_gaps_and_the_last_one_says_the_total(count: int) -> None:
    chunks = cut(samples(count))
    starts = [chunk.start for chunk in chunks]
    lengths = [chunk.samples.num_rows for chunk in chunks]
    assert starts == [sum(lengths[:i]) for i in range(len(lengths))]
    assert sum(lengths) == count
    assert max(lengths) <= 4
    assert [chunk.total for chunk in chunks] == [None] * (len(chunks) - 1) + [count]
    assert all(chunk.error is None and chunk.shard == 7 for chunk in chunks)


def test_a_chunk_ends_where_its_bytes_reach_the_limit() -> None:
    chunks = cut(samples(6, size=100), images=100, size=250)
    assert [chunk.samples.num_rows for chunk in chunks] == [2, 2, 2]


def test_an_image_larger_than_the_limit_is_a_chunk_of_its_own() -> None:
    chunks = cut([Sample("a", b"1"), Sample("b", bytes(500)), Sample("c", b"1")], size=250)
    assert [chunk.samples["key"].to_pylist() for chunk in chunks] == [["a"], ["b"], ["c"]]


def test_a_shard_that_breaks_off_ends_in_a_chunk_with_the_error() -> None:
    def broken() -> Iterator[Sample]:
        yield from samples(5)
        raise ShardError("s3://b/x.tar", "truncated")

    chunks = cut(broken())
    assert [chunk.samples.num_rows for chunk in chunks] == [4, 1]
    assert chunks[-1].total == 5
    assert chunks[-1].error == "s3://b/x.tar: truncated"


def test_a_chunk_survives_its_way_through_a_block() -> None:
    [chunk] = cut([Sample("a", b"image", 3), Sample("b", None, None, "no image")])
    block = chunk.to_block()
    assert block.num_rows == 1
    [back] = Chunk.from_block(block)
    assert back == chunk


def test_pixels_survive_their_way_through_a_block(tmp_path: object) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 5, 3), np.uint8)
    table = pa.table({"key": ["a", "b", "c"]})
    block = Chunk(1, 0, table, pixels=pixels).to_block()
    [back] = Chunk.from_block(block)
    assert back.pixels is not None
    np.testing.assert_array_equal(back.pixels, pixels)


def test_no_pixels_at_all_survive_too() -> None:
    pixels = np.empty((0, 5, 5, 3), np.uint8)
    [back] = Chunk.from_block(Chunk(1, 0, pa.table({"key": ["a"]}), pixels=pixels).to_block())
    assert back.pixels is not None
    assert back.pixels.shape == (0, 5, 5, 3)


def test_a_block_of_several_chunks_gives_each_of_them() -> None:
    chunks = cut(samples(10))
    block = pa.concat_tables([chunk.to_block() for chunk in chunks])
    assert list(Chunk.from_block(block)) == chunks


def test_an_empty_block_has_no_chunks() -> None:
    assert list(Chunk.from_block(pa.table({}))) == []
