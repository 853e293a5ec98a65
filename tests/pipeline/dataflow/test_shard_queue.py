from __future__ import annotations

import math

from pipeline.dataflow.shard_queue import ShardQueue
from pipeline.read import Shard

PLAN = [Shard(f"s3://b/{i}.tar", "v", "webdataset", 1) for i in range(5)]


def numbers(taken: list[tuple[int, Shard]] | None) -> list[int] | None:
    return None if taken is None else [number for number, _ in taken]


def test_each_shard_is_given_to_one_task() -> None:
    queue = ShardQueue(PLAN, [math.inf, 2])
    taken = [queue.take(pool, task, 2) for task in range(3) for pool in (0, 1)]
    assert [numbers(each) for each in taken] == [[0, 1], [2, 3], [4], [], [], []]
    assert [shard for each in taken for _, shard in each or ()] == PLAN


def test_retried_task_gets_the_same_shards() -> None:
    queue = ShardQueue(PLAN, [math.inf, math.inf])
    first = queue.take(0, 7, 1), queue.take(1, 7, 1)
    queue.finish(0)
    assert (queue.take(0, 7, 1), queue.take(1, 7, 1)) == first
    assert [numbers(each) for each in first] == [[0], [1]]


def test_slow_pool_waits_until_it_has_finished_a_shard() -> None:
    queue = ShardQueue(PLAN, [math.inf, 2])
    assert [numbers(queue.take(1, task, 1)) for task in range(3)] == [[0], [1], None]
    queue.finish(1)
    assert numbers(queue.take(1, 2, 1)) == [2]
    assert queue.take(1, 3, 1) is None
    assert [numbers(queue.take(0, task, 1)) for task in range(3)] == [[3], [4], []]
    assert queue.take(1, 3, 1) == []  # nothing is left to wait for
