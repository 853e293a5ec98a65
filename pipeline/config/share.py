"""A share of a dataset: the shards that one of several drivers labels."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, lcm
from typing import Any

_MAX_COUNT = 10_000  # of a share that is computed: the divisions of two runs may have no common divisor


@dataclass(frozen=True, slots=True)
class Share:
    """Share `index` of `count`, from 1. A dataset is divided by a hash of names, the same in every run."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str | None) -> Share:
        """Returns a share such as `2/8`; of None, the whole. Raises `ValueError`."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", "1/1" if text is None else text, re.ASCII)
        share = cls(*map(int, found.groups())) if found else cls(0, 0)
        if not 1 <= share.index <= share.count:
            raise ValueError("must be i/n, where i is from 1 to n, such as 2/8")
        return share

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Share:
        """Returns the share in a run record."""
        return cls.parse(record.get("config", {}).get("run", {}).get("share"))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def contains(self, name: str) -> bool:
        """Returns whether a name is in this share: exactly one share of each division has the name."""
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.count == self.index - 1

    def overlaps(self, other: Share) -> bool:
        """Returns whether a name can be in both shares, also of different divisions."""
        return (self.index - other.index) % gcd(self.count, other.count) == 0

    def without(self, other: Share) -> list[Share]:
        """Returns the shares that have the names of this share that are not in the other one.

        If these are shares of more than 10,000, returns this share.
        """
        count = lcm(self.count, other.count)
        if count > _MAX_COUNT or not self.overlaps(other):
            return [self]
        parts = (Share(index, count) for index in range(self.index, count + 1, self.count))
        return [part for part in parts if not part.overlaps(other)]


#: All shards of a dataset.
WHOLE = Share()
