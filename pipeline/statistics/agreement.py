"""Agreement of two models on the same samples: joined on shard and index, a shard at a time.

The two manifests, both sorted by shard, are merged, and tell of each shard whether there is anything to
compare: only prediction files of shards that both sides have, in one version, are opened. In memory are
the names of these, and the open shards' rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.statistics.confusion import PairCounts
from pipeline.statistics.drift import Classes


@dataclass
class Agreement:
    """How often two sides gave the same samples the same class; arrays by place in `classes.labels`.

    Attributes:
        classes: of both.
        same: samples given this class by both.
        given_a, given_b: compared samples given this class by one side.
        disagreements: pairs (class by the first side, class by the second) that differ.
        compared: samples labelled on both sides.
        only_a, only_b: samples labelled on one side only: those that are error rows on the other, or
            of shards that the other doesn't have.
        shards: that both have, and of which the samples were compared.
        changed_shards: that both have, but labelled in different versions, or labelled in another one, or
            gone, since the manifest was written: not compared.
    """

    classes: Classes
    same: np.ndarray = field(init=False)
    given_a: np.ndarray = field(init=False)
    given_b: np.ndarray = field(init=False)
    disagreements: PairCounts = field(default_factory=PairCounts)
    compared: int = 0
    only_a: int = 0
    only_b: int = 0
    shards: int = 0
    changed_shards: int = 0

    def __post_init__(self) -> None:
        self.same, self.given_a, self.given_b = np.zeros((3, len(self.classes.labels)), np.int64)

    @property
    def share(self) -> float | None:
        """Share of the compared samples that both gave the same class; None without any."""
        return int(self.same.sum()) / self.compared if self.compared else None

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa: agreement beyond what the classes' frequencies alone would give (1960)."""
        if self.share is None:
            return None
        chance = float((self.given_a / self.compared * (self.given_b / self.compared)).sum())
        return (self.share - chance) / (1 - chance) if chance < 1 else None

    def leave_out(self, labelled_a: int | None, labelled_b: int | None) -> None:
        """Counts the labelled samples of a shard that isn't compared; None where a side doesn't have it."""
        self.changed_shards += labelled_a is not None and labelled_b is not None
        self.only_a += labelled_a or 0
        self.only_b += labelled_b or 0

    def add(self, a: pa.Table, b: pa.Table) -> None:
        """Counts the samples of a shard, from the columns `index` and `label_id` of either side."""
        index_a, label_a = _labelled(a)
        index_b, label_b = _labelled(b)
        _, at_a, at_b = np.intersect1d(index_a, index_b, assume_unique=True, return_indices=True)
        first, second = self.classes.ids_a[label_a[at_a]], self.classes.ids_b[label_b[at_b]]
        is_same = first == second
        np.add.at(self.same, first[is_same], 1)
        np.add.at(self.given_a, first, 1)
        np.add.at(self.given_b, second, 1)
        self.disagreements.add(first[~is_same], second[~is_same])
        self.compared += len(first)
        self.only_a += len(label_a) - len(first)
        self.only_b += len(label_b) - len(first)
        self.shards += 1


def _labelled(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    rows = rows.filter(rows["label_id"].is_valid())
    return rows["index"].to_numpy(), rows["label_id"].to_numpy()
