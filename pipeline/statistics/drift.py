"""How two distributions over classes differ: counts, PSI, Jensen-Shannon distance. Pure functions.

- PSI, the population stability index: the sum of (b - a) ln(b / a) over the fractions of each class (Siddiqi,
  "Credit Risk Scorecards", 2006). An empty class would make it infinite, so half an image is added to every
  class that occurs on either side (Jeffreys' prior). Without any drift it isn't 0, but about
  (K - 1)(1/n + 1/m) for K classes and n and m images (Yurdakul and Naranjo, "Statistical properties of the
  population stability index", Journal of Risk Model Validation 14(4), 2020): `psi_by_chance`.
- Jensen-Shannon distance: the square root of the divergence in bits, from 0 to 1 (Endres and Schindelin, "A
  new metric for probability distributions", IEEE Trans. Inf. Theory 49(7), 2003), as
  `scipy.spatial.distance.jensenshannon(a, b, base=2)`. Nothing is added to empty classes. The classes' parts
  are parts of the divergence: they sum to the square of the distance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.statistics.classes import HISTOGRAM_BINS

#: Bins of the scores' PSI, over [0, 1].
DRIFT_BINS = 10

_ADDED = 0.5


def psi_parts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Each class's part of the PSI between counts, along the last axis; 0 for one that is on neither side."""
    occurs = (a > 0) | (b > 0)
    first, second = (_fractions(np.where(occurs, side + _ADDED, 0)) for side in (a, b))
    ratio = np.divide(second, first, out=np.ones_like(first), where=occurs)
    return (second - first) * np.log(ratio)


def _fractions(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), _ADDED)


def psi(a: np.ndarray, b: np.ndarray) -> float:
    """The population stability index between counts."""
    return float(psi_parts(a, b).sum())


def psi_by_chance(a: np.ndarray, b: np.ndarray) -> float:
    """What the PSI of two samples of these sizes is on average, if nothing has drifted."""
    classes = int(((a > 0) | (b > 0)).sum())
    return max(0, classes - 1) * (1 / max(1, int(a.sum())) + 1 / max(1, int(b.sum())))


def js_parts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Each class's part of the Jensen-Shannon divergence between counts, in bits; none is negative."""
    p, q = a / max(1, int(a.sum())), b / max(1, int(b.sum()))
    middle = (p + q) / 2
    parts = np.zeros(len(p))
    for side in (p, q):
        ratio = np.divide(side, middle, out=np.ones_like(side), where=side > 0)
        parts += side * np.log2(ratio) / 2
    return np.maximum(parts, 0)  # where they are equal, rounding may leave less


def js_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Jensen-Shannon distance between counts: 0 for equal fractions, 1 for disjoint ones."""
    return float(np.sqrt(np.clip(js_parts(a, b).sum(), 0, 1)))


@dataclass(frozen=True)
class Classes:
    """The classes of two models, matched by name; of classes that share one, the first with the first.

    Attributes:
        labels: of both, those of the first model in its order, and then those that only the second has.
        ids_a, ids_b: of each model's class ids, the place in `labels`.
    """

    labels: list[str]
    ids_a: np.ndarray
    ids_b: np.ndarray

    @classmethod
    def matched(cls, a: Sequence[str], b: Sequence[str]) -> Classes:
        """Matches two models' class names."""
        places = {name: i for i, name in enumerate(_numbered(a))}
        ids_b = [places.setdefault(name, len(places)) for name in _numbered(b)]
        labels = [name for name, _ in places]
        return cls(labels, np.arange(len(a)), np.array(ids_b, np.int64))

    @cached_property
    def in_a(self) -> np.ndarray:
        """Whether the first model has each class."""
        return np.isin(np.arange(len(self.labels)), self.ids_a)

    @cached_property
    def in_b(self) -> np.ndarray:
        """Whether the second model has each class."""
        return np.isin(np.arange(len(self.labels)), self.ids_b)

    @property
    def only_a(self) -> int:
        """Classes that only the first model has."""
        return int((~self.in_b).sum())

    @property
    def only_b(self) -> int:
        """Classes that only the second model has."""
        return int((~self.in_a).sum())


def _numbered(labels: Sequence[str]) -> Iterator[tuple[str, int]]:
    seen: Counter[str] = Counter()
    for label in labels:
        yield label, seen[label]
        seen[label] += 1


@dataclass(frozen=True)
class Drift:
    """How what two sides were labelled differs, by class.

    Attributes:
        classes: of both.
        count_a, count_b: images that were given each class, int64 (classes,).
        scores_a, scores_b: histograms of their scores, int64 (classes, `DRIFT_BINS`).
    """

    classes: Classes
    count_a: np.ndarray
    count_b: np.ndarray
    scores_a: np.ndarray
    scores_b: np.ndarray

    @classmethod
    def between(
        cls, classes: Classes, a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]
    ) -> Drift:
        """From the counts and score histograms of either side, by its own class ids."""

        def placed(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
            result = np.zeros((len(classes.labels), *values.shape[1:]), np.int64)
            result[ids] = values
            return result

        def coarse(histogram: np.ndarray) -> np.ndarray:
            return histogram.reshape(-1, DRIFT_BINS, HISTOGRAM_BINS // DRIFT_BINS).sum(axis=2)

        return cls(
            classes,
            placed(a[0], classes.ids_a),
            placed(b[0], classes.ids_b),
            placed(coarse(a[1]), classes.ids_a),
            placed(coarse(b[1]), classes.ids_b),
        )

    @property
    def images_a(self) -> int:
        """Labelled images of the first side."""
        return int(self.count_a.sum())

    @property
    def images_b(self) -> int:
        """Labelled images of the second side."""
        return int(self.count_b.sum())

    @property
    def fraction_a(self) -> np.ndarray:
        """Share of each class in the first side."""
        return self.count_a / max(1, self.images_a)

    @property
    def fraction_b(self) -> np.ndarray:
        """Share of each class in the second side."""
        return self.count_b / max(1, self.images_b)

    @property
    def psi_parts(self) -> np.ndarray:
        """Each class's part of the PSI."""
        return psi_parts(self.count_a, self.count_b)

    @property
    def psi(self) -> float:
        """Population stability index of the classes."""
        return psi(self.count_a, self.count_b)

    @property
    def psi_by_chance(self) -> float:
        """What it is on average without drift."""
        return psi_by_chance(self.count_a, self.count_b)

    @property
    def js_parts(self) -> np.ndarray:
        """Each class's part of the Jensen-Shannon divergence, in bits: they sum to the distance squared."""
        return js_parts(self.count_a, self.count_b)

    @property
    def js(self) -> float:
        """Jensen-Shannon distance of the classes."""
        return js_distance(self.count_a, self.count_b)

    @property
    def score_psi(self) -> float:
        """Population stability index of the scores, over all classes."""
        return psi(self.scores_a.sum(axis=0), self.scores_b.sum(axis=0))

    @property
    def class_score_psi(self) -> np.ndarray:
        """The same of each class; NaN where a side doesn't have it."""
        parts = psi_parts(self.scores_a, self.scores_b).sum(axis=1)
        return np.where((self.count_a > 0) & (self.count_b > 0), parts, np.nan)

    def most_changed(self, n: int) -> list[int]:
        """The classes with the largest parts of the PSI, of those that occur; by their place."""
        parts = self.psi_parts
        best = np.argsort(-parts, kind="stable")[:n]
        return [int(i) for i in best if self.count_a[i] or self.count_b[i]]
