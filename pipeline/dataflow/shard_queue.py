"""Divides the shards of a plan among several pools of classifiers; imports no Ray."""

from collections import deque
from collections.abc import Sequence

from pipeline.read import Shard


class ShardQueue:
    """Gives shards to the read tasks of the pools on request, so that a slow pool gets fewer."""

    def __init__(self, plan: Sequence[Shard], limits: Sequence[float]) -> None:
        """Takes the number of unfinished shards from which each pool must wait."""
        self._waiting = deque(enumerate(plan))
        self._limits = limits
        self._unfinished = [set[int]() for _ in limits]
        self._taken: dict[tuple[int, int], list[tuple[int, Shard]]] = {}

    def take(self, pool: int, task: int, count: int) -> list[tuple[int, Shard]] | None:
        """Returns up to `count` numbered shards for a task, or None if the pool must wait.

        A retried task gets the same shards, so that its read yields the same chunks.
        """
        if (pool, task) not in self._taken:
            unfinished = self._unfinished[pool]
            if self._waiting and len(unfinished) >= self._limits[pool]:
                return None
            shards = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
            unfinished.update(number for number, _ in shards)
            self._taken[pool, task] = shards
        return self._taken[pool, task]

    def finish(self, shard: int) -> None:
        """Records that all chunks of a shard are classified."""
        for unfinished in self._unfinished:
            unfinished.discard(shard)
