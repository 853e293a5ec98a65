"""The early stop of a run: the sample of its failures, and when the sample is certain."""

from __future__ import annotations

import math

from pipeline.commit import ManifestRow
from pipeline.config import GateConfig
from pipeline.read import Shard
from pipeline.run.failures import FailureMonitor, is_certain


def make_monitor(sizes: dict[int, int]) -> FailureMonitor:
    """Makes the monitor of 100 shards of 10 bytes, except those in `sizes`."""
    shards = [Shard(f"s3://b/{i}.tar", "v", "webdataset", sizes.get(i, 10)) for i in range(100)]
    return FailureMonitor(GateConfig(), shards, {})


def finish(monitor: FailureMonitor, index: int, errors: int) -> None:
    monitor.finish(ManifestRow(monitor.shards[index].uri, rows=100, errors=errors))


def test_sample_is_certain_only_if_chance_is_below_one_in_a_thousand() -> None:
    """Exact binomial tails: a sample that counts as certain has a probability of at most 1/1000."""
    for limit in (0.01, 0.1, 0.5, 0.9):
        for count in (1, 5, 10, 30, 100):
            for failed in range(count + 1):
                tail = sum(
                    math.comb(count, k) * limit**k * (1 - limit) ** (count - k)
                    for k in range(failed, count + 1)
                )
                assert not is_certain(failed / count, limit, count) or tail <= 1e-3
    assert [is_certain(1, 0.5, n) for n in (9, 10)] == [False, True]
    assert [is_certain(1, 0.1, n) for n in (2, 3)] == [False, True]
    assert [is_certain(1, 0.01, n) for n in (1, 2)] == [False, True]


def test_shards_that_fail_sooner_than_others_succeed_do_not_stop_a_run() -> None:
    monitor = make_monitor({})
    first, *others = monitor.order
    for index in others[:40]:  # results do not arrive in the random order
        finish(monitor, index, 100)
    assert monitor.certain_violations() == []
    finish(monitor, first, 0)
    [message] = monitor.certain_violations()
    assert message.startswith("4,000 of 4,100 images")


def test_small_shards_do_not_stop_a_run_with_a_much_larger_shard() -> None:
    monitor = make_monitor({})
    large = monitor.order[-1]  # may hold most of the images
    for sizes, stops in (({}, True), ({large: 1000}, False)):
        monitor = make_monitor(sizes)
        for index in monitor.order[:50]:
            finish(monitor, index, 100)
        assert bool(monitor.certain_violations()) is stops
