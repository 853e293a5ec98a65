"""Divides the shards of a plan among several pools of classifiers; imports no Ray."""

import asyncio
from collections import deque
from collections.abc import Sequence

from pipeline.read import Shard


class ShardQueue:
    """Gives shards to the read tasks of the pools on request, so that a slow pool gets fewer."""

    def __init__(self, plan: Sequence[Shard], pools: int) -> None:
        self._waiting = deque(enumerate(plan))
        self._classifiers = [set[str]() for _ in range(pools)]
        self._unfinished = [set[int]() for _ in range(pools)]
        self._taken: dict[tuple[int, int], list[tuple[int, Shard]]] = {}
        self._changed = asyncio.Condition()

    async def join(self, pool: int, classifier: str) -> None:
        """Records that a classifier of a pool has started."""
        async with self._changed:
            self._classifiers[pool].add(classifier)
            self._changed.notify_all()

    async def take(self, pool: int, task: int, count: int) -> list[tuple[int, Shard]]:
        """Returns up to `count` numbered shards for a task, as soon as the pool need not wait.

        The first pool never waits. Another pool has a shard per classifier, and one in advance. A retried
        task gets the same shards, so that its read yields the same chunks.
        """
        unfinished, classifiers = self._unfinished[pool], self._classifiers[pool]

        def is_ready() -> bool:
            has_room = 0 < len(classifiers) >= len(unfinished)
            return pool == 0 or has_room or not self._waiting or (pool, task) in self._taken

        async with self._changed:
            await self._changed.wait_for(is_ready)
            if (pool, task) not in self._taken:
                shards = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
                unfinished.update(number for number, _ in shards)
                self._taken[pool, task] = shards
                self._changed.notify_all()
            return self._taken[pool, task]

    async def finish(self, shard: int) -> None:
        """Records that all chunks of a shard are classified."""
        async with self._changed:
            for unfinished in self._unfinished:
                unfinished.discard(shard)
            self._changed.notify_all()
