"""Drift between two distributions over classes: PSI and Jensen-Shannon distance, in total and per class.

The distance [3] equals `scipy.spatial.distance.jensenshannon(a, b, base=2)`.

[1] Siddiqi, "Credit Risk Scorecards", 2006.
[2] Yurdakul and Naranjo, "Statistical properties of the population stability index", Journal of Risk Model
    Validation 14(4), 2020.
[3] Endres and Schindelin, "A new metric for probability distributions", IEEE Trans. Inf. Theory 49(7), 2003.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

#: Number of score bins over [0, 1] for the PSI of the scores.
DRIFT_BINS = 10
_PRIOR = 0.5


def psi_by_class(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns each class's contribution to the PSI [1] between counts, along the last axis.

    A contribution is (b - a) ln(b / a) of the fractions. Half an image is added to each class that occurs in
    a or b (Jeffreys' prior), so that an empty class does not make the PSI infinite.
    """
    occurs = (a > 0) | (b > 0)
    smoothed = (np.where(occurs, counts + _PRIOR, 0) for counts in (a, b))
    first, second = (each / np.maximum(each.sum(axis=-1, keepdims=True), _PRIOR) for each in smoothed)
    ratio = np.divide(second, first, out=np.ones_like(first), where=occurs)
    parts: np.ndarray = (second - first) * np.log(ratio)
    return parts


def js_divergence_by_class(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns each class's contribution to the Jensen-Shannon divergence between counts, in bits."""
    p, q = a / max(1, int(a.sum())), b / max(1, int(b.sum()))
    middle = (p + q) / 2
    parts = np.zeros(len(p))
    for fractions in (p, q):
        ratio = np.divide(fractions, middle, out=np.ones_like(fractions), where=fractions > 0)
        parts += fractions * np.log2(ratio) / 2
    return np.maximum(parts, 0)  # rounding may give negative values for equal fractions


@dataclass(frozen=True)
class ClassMapping:
    """The classes of two models a and b, matched by name. Classes with the same name are matched in order.

    Attributes:
        labels: Names of all classes: the classes of a in their order, then the classes that only b has.
        ids_a, ids_b: Index in `labels` of each class id of a, and of b.
    """

    labels: list[str]
    ids_a: np.ndarray
    ids_b: np.ndarray

    @classmethod
    def matched(cls, a: Sequence[str], b: Sequence[str]) -> Self:
        """Matches the class names of two models."""
        indices = {name: i for i, name in enumerate(_numbered(a))}
        ids_b = [indices.setdefault(name, len(indices)) for name in _numbered(b)]
        labels = [name for name, _ in indices]
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
    """Yields each label with the number of earlier labels of the same name."""
    seen: Counter[str] = Counter()
    for label in labels:
        yield label, seen[label]
        seen[label] += 1


class Drift:
    """Drift of the classes and scores between two label sets a and b.

    Args:
        classes: Classes of both label sets.
        a, b: Per label set, by its own class ids: number of images, int64 (classes,), and score histograms,
            int64 (classes, `HISTOGRAM_BINS`).

    Attributes:
        count_a, count_b: Number of images of each class, int64 (classes,), by index in `classes.labels`.
        scores_a, scores_b: Score histograms of each class, int64 (classes, `DRIFT_BINS`).
        psi_by_class, js_divergence_by_class: Contribution of each class; the divergence is in bits.
        psi_by_chance: Expected value of `psi` without drift, (K - 1)(1/n + 1/m) for K classes and n and m
            images [2].
        class_score_psi: PSI of the scores of each class; NaN for a class that a or b does not have.
    """

    def __init__(
        self, classes: ClassMapping, a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]
    ) -> None:
        self.classes = classes
        self.count_a, self.scores_a = self._by_class(*a, classes.ids_a)
        self.count_b, self.scores_b = self._by_class(*b, classes.ids_b)
        self.images_a, self.images_b = int(self.count_a.sum()), int(self.count_b.sum())
        self.fraction_a = self.count_a / max(1, self.images_a)
        self.fraction_b = self.count_b / max(1, self.images_b)
        self.psi_by_class = psi_by_class(self.count_a, self.count_b)
        self.psi = float(self.psi_by_class.sum())
        occurring = int(((self.count_a > 0) | (self.count_b > 0)).sum())
        inverse_images = 1 / max(1, self.images_a) + 1 / max(1, self.images_b)
        self.psi_by_chance = max(0, occurring - 1) * inverse_images
        self.js_divergence_by_class = js_divergence_by_class(self.count_a, self.count_b)
        self.js_distance = float(np.sqrt(np.clip(self.js_divergence_by_class.sum(), 0, 1)))
        score_psi = psi_by_class(self.scores_a, self.scores_b).sum(axis=1)
        self.class_score_psi = np.where((self.count_a > 0) & (self.count_b > 0), score_psi, np.nan)
        self.score_psi = float(psi_by_class(self.scores_a.sum(axis=0), self.scores_b.sum(axis=0)).sum())

    def _by_class(
        self, count: np.ndarray, histogram: np.ndarray, ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns counts and histograms by index in `classes.labels`, from those by class id."""
        counts = np.zeros(len(self.classes.labels), np.int64)
        scores = np.zeros((len(self.classes.labels), DRIFT_BINS), np.int64)
        counts[ids], scores[ids] = count, histogram.reshape(len(ids), DRIFT_BINS, -1).sum(axis=2)
        return counts, scores

    def most_changed(self, n: int) -> list[int]:
        """Returns the `n` occurring classes with the largest contributions to the PSI, as indices."""
        best = np.argsort(-self.psi_by_class, kind="stable")[:n]
        return [int(i) for i in best if self.count_a[i] or self.count_b[i]]
