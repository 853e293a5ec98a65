"""How two distributions over classes differ: PSI and Jensen-Shannon distance, as the sums of parts by class.

- PSI, the population stability index: the sum of (b - a) ln(b / a) over the fractions of each class (Siddiqi,
  "Credit Risk Scorecards", 2006). An empty class would make it infinite, so half an image is added to every
  class that occurs in a or b (Jeffreys' prior). Without any drift it isn't 0, but about
  (K - 1)(1/n + 1/m) for K classes and n and m images (Yurdakul and Naranjo, "Statistical properties of the
  population stability index", Journal of Risk Model Validation 14(4), 2020): `psi_by_chance`.
- Jensen-Shannon distance: the square root of the divergence in bits, from 0 to 1 (Endres and Schindelin, "A
  new metric for probability distributions", IEEE Trans. Inf. Theory 49(7), 2003), equal to
  `scipy.spatial.distance.jensenshannon(a, b, base=2)`. Nothing is added to empty classes.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

#: Bins of the scores' PSI, over [0, 1].
DRIFT_BINS = 10
_ADDED = 0.5


def psi_by_class(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Each class's part of the PSI between counts, along the last axis; 0 for a class in neither."""
    occurs = (a > 0) | (b > 0)
    with_added = (np.where(occurs, counts + _ADDED, 0) for counts in (a, b))
    first, second = (each / np.maximum(each.sum(axis=-1, keepdims=True), _ADDED) for each in with_added)
    ratio = np.divide(second, first, out=np.ones_like(first), where=occurs)
    parts: np.ndarray = (second - first) * np.log(ratio)
    return parts


def psi_by_chance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean PSI of two samples of these sizes from the same distribution."""
    classes = int(((a > 0) | (b > 0)).sum())
    return max(0, classes - 1) * (1 / max(1, int(a.sum())) + 1 / max(1, int(b.sum())))


def js_divergence_by_class(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Each class's part of the Jensen-Shannon divergence between counts, in bits; none is negative."""
    p, q = a / max(1, int(a.sum())), b / max(1, int(b.sum()))
    middle = (p + q) / 2
    parts = np.zeros(len(p))
    for fractions in (p, q):
        ratio = np.divide(fractions, middle, out=np.ones_like(fractions), where=fractions > 0)
        parts += fractions * np.log2(ratio) / 2
    return np.maximum(parts, 0)  # equal fractions may give less, by rounding


@dataclass(frozen=True)
class ClassMapping:
    """The classes of two models a and b, matched by name; classes with the same name by their order.

    Attributes:
        labels: names of all classes: those of a in their order, and then those that only b has.
        ids_a, ids_b: place in `labels` of each class id of a model.
    """

    labels: list[str]
    ids_a: np.ndarray
    ids_b: np.ndarray

    @classmethod
    def matched(cls, a: Sequence[str], b: Sequence[str]) -> Self:
        """Matches two models' class names."""
        places = {name: i for i, name in enumerate(_numbered(a))}
        ids_b = [places.setdefault(name, len(places)) for name in _numbered(b)]
        labels = [name for name, _ in places]
        return cls(labels, np.arange(len(a)), np.array(ids_b, np.int64))

    @property
    def only_a(self) -> int:
        """Number of classes that only a has."""
        return len(self.labels) - len(self.ids_b)

    @property
    def only_b(self) -> int:
        """Number of classes that only b has."""
        return len(self.labels) - len(self.ids_a)


def _numbered(labels: Sequence[str]) -> Iterator[tuple[str, int]]:
    seen: Counter[str] = Counter()
    for label in labels:
        yield label, seen[label]
        seen[label] += 1


class Drift:
    """How the classes and scores of two label sets a and b differ.

    Args:
        classes: classes of both label sets.
        a, b: of each, images by class, int64 (classes,), and histograms of their scores, int64 (classes,
            `HISTOGRAM_BINS`), by its own class ids.

    Attributes:
        count_a, count_b: images given each class, int64 (classes,), by place in `classes.labels`.
        scores_a, scores_b: histograms of their scores, int64 (classes, `DRIFT_BINS`).
        psi_by_class: each class's contribution to the PSI.
        js_divergence_by_class: each class's contribution to the Jensen-Shannon divergence, in bits.
        class_score_psi: PSI of each class's scores; NaN where a or b doesn't have the class.
        psi_by_chance: mean of `psi` without drift.
        js_distance: Jensen-Shannon distance of the classes: 0 for equal fractions, 1 for disjoint ones.
        score_psi: population stability index of the scores of all classes.
    """

    def __init__(
        self, classes: ClassMapping, a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]
    ) -> None:
        self.classes = classes
        self.count_a, self.scores_a = self._placed(*a, classes.ids_a)
        self.count_b, self.scores_b = self._placed(*b, classes.ids_b)
        self.images_a, self.images_b = int(self.count_a.sum()), int(self.count_b.sum())
        self.fraction_a = self.count_a / max(1, self.images_a)
        self.fraction_b = self.count_b / max(1, self.images_b)
        self.psi_by_class = psi_by_class(self.count_a, self.count_b)
        self.psi = float(self.psi_by_class.sum())
        self.psi_by_chance = psi_by_chance(self.count_a, self.count_b)
        self.js_divergence_by_class = js_divergence_by_class(self.count_a, self.count_b)
        self.js_distance = float(np.sqrt(np.clip(self.js_divergence_by_class.sum(), 0, 1)))
        score_psi = psi_by_class(self.scores_a, self.scores_b).sum(axis=1)
        self.class_score_psi = np.where((self.count_a > 0) & (self.count_b > 0), score_psi, np.nan)
        self.score_psi = float(psi_by_class(self.scores_a.sum(axis=0), self.scores_b.sum(axis=0)).sum())

    def _placed(
        self, count: np.ndarray, histogram: np.ndarray, ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        counts = np.zeros(len(self.classes.labels), np.int64)
        scores = np.zeros((len(self.classes.labels), DRIFT_BINS), np.int64)
        counts[ids], scores[ids] = count, histogram.reshape(len(ids), DRIFT_BINS, -1).sum(axis=2)
        return counts, scores

    def most_changed(self, n: int) -> list[int]:
        """The occurring classes with the largest parts of the PSI, by place in `classes.labels`."""
        best = np.argsort(-self.psi_by_class, kind="stable")[:n]
        return [int(i) for i in best if self.count_a[i] or self.count_b[i]]
