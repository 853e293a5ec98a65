from __future__ import annotations

import asyncio

from pipeline.dataflow.shard_queue import ShardQueue
from pipeline.read import Shard

PLAN = [Shard(f"s3://b/{i}.tar", "v", "webdataset", 1) for i in range(5)]


async def take(queue: ShardQueue, pool: int, task: int, count: int = 1) -> list[int]:
    return [number for number, _ in await queue.take(pool, task, count)]


async def make_queue(*classifiers: int) -> ShardQueue:
    """Returns a queue for pools with these numbers of classifiers."""
    queue = ShardQueue(PLAN, len(classifiers))
    for pool, count in enumerate(classifiers):
        for number in range(count):
            await queue.join(pool, f"{pool}-{number}")
    return queue


async def wait_a_moment() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_each_shard_is_given_to_one_task() -> None:
    async def run() -> None:
        queue = await make_queue(0, 1)
        taken = [await queue.take(pool, task, 2) for task in range(3) for pool in (0, 1)]
        assert [[number for number, _ in each] for each in taken] == [[0, 1], [2, 3], [4], [], [], []]
        assert [shard for each in taken for _, shard in each] == PLAN

    asyncio.run(run())


def test_retried_task_gets_the_same_shards() -> None:
    async def run() -> None:
        queue = await make_queue(0, 1)
        assert [await take(queue, pool, 7) for pool in (0, 1)] == [[0], [1]]
        await queue.finish(0)
        assert [await take(queue, pool, 7) for pool in (0, 1)] == [[0], [1]]

    asyncio.run(run())


def test_slow_pool_waits_until_it_has_finished_a_shard() -> None:
    async def run() -> None:
        queue = await make_queue(0, 1)
        assert [await take(queue, 1, task) for task in range(2)] == [[0], [1]]
        third, again = (asyncio.create_task(take(queue, 1, 2)) for _ in range(2))
        fourth = asyncio.create_task(take(queue, 1, 3))
        await wait_a_moment()
        assert not any(each.done() for each in (third, again, fourth))
        await queue.finish(1)
        await wait_a_moment()
        assert third.result() == again.result() == [2]  # the task and its retry
        assert not fourth.done()
        assert [await take(queue, 0, task) for task in range(3)] == [[3], [4], []]
        assert await fourth == []  # nothing is left to wait for

    asyncio.run(run())


def test_slow_pool_gets_shards_for_the_classifiers_that_have_started() -> None:
    async def run() -> None:
        queue = await make_queue(0, 0)
        tasks = [asyncio.create_task(take(queue, 1, task)) for task in range(5)]
        for classifier, started in (("", 0), ("a", 2), ("a", 2), ("b", 3)):  # "a" restarts
            if classifier:
                await queue.join(1, classifier)
            await wait_a_moment()
            assert sum(task.done() for task in tasks) == started
        assert await take(queue, 0, 0) == [3]
        assert await take(queue, 0, 1) == [4]
        assert [await task for task in tasks] == [[0], [1], [2], [], []]

    asyncio.run(run())
