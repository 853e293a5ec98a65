from __future__ import annotations

import random
from collections import Counter
from math import sqrt

import pytest

from pipeline.config import ConfigError, Share
from tests.runs import run_config

NAMES = [f"s3://b/in/{number:05d}.tar" for number in range(8000)]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 64, 999])
def test_every_name_is_in_exactly_one_share_of_a_division(count: int) -> None:
    shares = [Share(index, count) for index in range(1, count + 1)]
    for name in random.Random(count).sample(NAMES, 200):
        assert sum(share.contains(name) for share in shares) == 1


def test_division_is_the_same_in_every_version_of_the_program() -> None:
    """A changed hash would label shards twice, or not at all, while two versions run."""
    found = [next(i for i in range(1, 9) if Share(i, 8).contains(name)) for name in NAMES[:12]]
    assert found == [5, 7, 1, 1, 1, 1, 7, 6, 1, 5, 2, 7]


@pytest.mark.parametrize("count", [2, 8, 64])
def test_sizes_of_shares_vary_as_for_random_numbers(count: int) -> None:
    """Of N files, a share has N/n, with a standard deviation of sqrt(N/n)."""
    sizes = Counter(next(i for i in range(count) if Share(i + 1, count).contains(name)) for name in NAMES)
    mean = len(NAMES) / count
    assert max(abs(sizes[i] - mean) for i in range(count)) < 4 * sqrt(mean)


def test_shares_overlap_exactly_if_they_have_a_name_in_common() -> None:
    shares = [Share(index, count) for count in range(1, 9) for index in range(1, count + 1)]
    members = {share: {name for name in NAMES[:2000] if share.contains(name)} for share in shares}
    for a in shares:
        for b in shares:
            assert a.overlaps(b) == bool(members[a] & members[b]), (a, b)


def test_share_without_another_has_all_other_names_once() -> None:
    shares = [Share(index, count) for count in (1, 2, 3, 4, 6) for index in range(1, count + 1)]
    members = {share: {name for name in NAMES[:500] if share.contains(name)} for share in shares}
    for a in shares:
        for b in shares:
            rest = [name for name in NAMES[:500] for part in a.without(b) if part.contains(name)]
            assert sorted(rest) == sorted(members[a] - members[b]), (a, b)


@pytest.mark.parametrize(
    "share", ["0/3", "4/3", "a", "1/0", "'1'", "-1/3", "1/3/3", "1.0/2", "9999999/9999999", "''"]
)
def test_invalid_share_is_an_error_with_the_expected_form(share: str) -> None:
    expected = r"--set run\.share=.*: must be i/n, where i is from 1 to n, such as 2/8"
    with pytest.raises(ConfigError, match=expected):
        run_config("/data", f"run.share={share}")


def test_share_does_not_change_the_fingerprint() -> None:
    assert run_config("/data", "run.share=2/3").fingerprint("x") == run_config("/data").fingerprint("x")


def test_share_without_conditional_writes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--set run\.share=1/2: several runs at once need storage"):
        run_config("/data", "run.share=1/2", "storage.conditional_writes=false")
