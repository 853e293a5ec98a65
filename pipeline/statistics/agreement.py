"""Agreement of two label sets on the same samples."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.statistics.confusion import PairCounts
from pipeline.statistics.drift import Classes


@dataclass
class Agreement:
    """How often two label sets a and b give the same sample the same class.

    Arrays have the shape (classes,), by place in `classes.labels`.

    Attributes:
        same: samples given this class by both.
        given_a, given_b: compared samples given this class by one.
        disagreements: pairs (class in a, class in b) that differ.
        only_a, only_b: samples labeled in one only: an error row in the other, or in a shard that wasn't
            compared.
        shards: shards whose samples were compared.
        changed_shards: shards that both have, but labeled in different versions, or relabeled in another
            version or deleted since the manifest was written.
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
        """Fraction of the compared samples that both gave the same class; None where none was compared."""
        return int(self.same.sum()) / self.compared if self.compared else None

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa (1960): agreement beyond what the classes' frequencies alone would give."""
        if self.share is None:
            return None
        chance = float((self.given_a / self.compared * (self.given_b / self.compared)).sum())
        return (self.share - chance) / (1 - chance) if chance < 1 else None

    def add(self, a: pa.Table, b: pa.Table) -> None:
        """Counts the samples of one shard, from the columns `index` and `label_id` of both label sets."""
        index_a, label_a = _labeled(a)
        index_b, label_b = _labeled(b)
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


def _labeled(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    rows = rows.filter(rows["label_id"].is_valid())
    return rows["index"].to_numpy(), rows["label_id"].to_numpy()
