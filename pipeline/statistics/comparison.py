"""Comparison of two label sets: agreement, drift, totals, a table per class, and limits."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.statistics.confusion import PairCounts
from pipeline.statistics.drift import DRIFT_BINS, ClassMapping, Drift
from pipeline.text import format_percent, format_score, pluralize

#: Metadata key of the comparison table. The value is the JSON of the totals.
TOTALS = "cvt_label.comparison"
_DRIFT_TOTALS = ("images_a", "images_b", "psi", "psi_by_chance", "js_distance", "score_psi")
_AGREEMENT_TOTALS = ("compared", "only_a", "only_b", "shards", "changed_shards", "kappa")
_MAX_PAIRS = 100


class LabelSetId(NamedTuple):
    """Identifies a label set: all labels of the partition at a URI, or the labels of one run."""

    uri: str
    run: str | None = None

    @property
    def name(self) -> str:
        """`URI` or `URI@RUN`."""
        return self.uri if self.run is None else f"{self.uri}@{self.run}"


class AgreementStatistics:
    """Sample-by-sample agreement of two label sets a and b.

    Arrays have the shape (classes,), by index in `classes.labels`.

    Attributes:
        same: Number of samples that have the class in a and in b.
        compared_a, compared_b: Number of compared samples that have the class in a, and in b.
        disagreements: Pairs (class in a, class in b) of the samples whose classes differ.
        only_a, only_b: Number of samples that are labeled only in a, or only in b. In the other label set the
            sample is an error, or its shard was not compared.
        shards: Number of shards whose samples were compared.
        changed_shards: Number of shards in both label sets that have different versions there.
    """

    def __init__(self, classes: ClassMapping) -> None:
        self.classes = classes
        self.same, self.compared_a, self.compared_b = np.zeros((3, len(classes.labels)), np.int64)
        self.disagreements = PairCounts()
        self.compared = self.only_a = self.only_b = self.shards = self.changed_shards = 0

    @property
    def fraction(self) -> float | None:
        """Fraction of the compared samples that have the same class in a and b; None without samples."""
        return int(self.same.sum()) / self.compared if self.compared else None

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa (1960): agreement beyond the agreement expected from the class frequencies."""
        if self.fraction is None:
            return None
        chance = float((self.compared_a / self.compared * (self.compared_b / self.compared)).sum())
        return (self.fraction - chance) / (1 - chance) if chance < 1 else None

    def add(self, a: pa.Table, b: pa.Table) -> None:
        """Adds one shard, from the columns `index` and `label_id` of both label sets."""
        a, b = (rows.filter(rows["label_id"].is_valid()) for rows in (a, b))
        both = a.join(b, "index", join_type="inner", right_suffix="_b")
        first = self.classes.ids_a[both["label_id"].to_numpy()]
        second = self.classes.ids_b[both["label_id_b"].to_numpy()]
        is_same = first == second
        np.add.at(self.same, first[is_same], 1)
        np.add.at(self.compared_a, first, 1)
        np.add.at(self.compared_b, second, 1)
        self.disagreements.add(first[~is_same], second[~is_same])
        self.compared += len(first)
        self.only_a += len(a) - len(first)
        self.only_b += len(b) - len(first)
        self.shards += 1


@dataclass(frozen=True)
class Comparison:
    """The differences of two label sets a and b; `agreement` is None if not measured."""

    a: LabelSetId
    b: LabelSetId
    drift: Drift
    agreement: AgreementStatistics | None

    @property
    def totals(self) -> dict[str, Any]:
        """The values over all classes, which are also in the table's metadata."""
        drift, agreement, labels = self.drift, self.agreement, self.drift.classes.labels
        values: dict[str, Any] = {
            "a": self.a.name,
            "b": self.b.name,
            "classes": len(labels),
            "classes_only_a": drift.classes.only_a,
            "classes_only_b": drift.classes.only_b,
            "score_bins": DRIFT_BINS,
        }
        values |= {name: getattr(drift, name) for name in _DRIFT_TOTALS}
        if agreement is not None:
            values |= {name: getattr(agreement, name) for name in _AGREEMENT_TOTALS}
            values |= {
                "agreement": agreement.fraction,
                "disagreements": [
                    {"a": labels[a], "b": labels[b], "count": count}
                    for a, b, count in agreement.disagreements.most_common(_MAX_PAIRS)
                ],
                "disagreements_uncounted": agreement.disagreements.uncounted,
            }
        return values

    def summary(self, in_a: str, in_b: str) -> dict[str, str]:
        """Returns the totals in words, by title; `in_a` and `in_b` are the words for "in a" and "in b"."""
        drift, agreement, classes = self.drift, self.agreement, self.drift.classes
        facts = {
            "Labeled images": f"{drift.images_a:,} {in_a}, {drift.images_b:,} {in_b}",
            "PSI of the classes": f"{drift.psi:.4f} (about {drift.psi_by_chance:.4f} by chance alone)",
            "Jensen-Shannon distance": f"{drift.js_distance:.4f}",
            "PSI of the scores": f"{drift.score_psi:.4f}",
        }
        if classes.only_a or classes.only_b:
            facts["Classes"] = (
                f"{len(classes.labels):,}, matched by name: {classes.only_a:,} only {in_a}, "
                f"{classes.only_b:,} only {in_b}"
            )
        if agreement is not None:
            compared = pluralize(agreement.compared, "image")
            facts["Same class"] = (
                f"{format_percent(agreement.fraction)} of {compared} labeled in both, "
                f"Cohen's kappa {format_score(agreement.kappa)}"
            )
            only_a = pluralize(agreement.only_a, "image")
            facts["Not compared"] = (
                f"{only_a} labeled only {in_a}, {agreement.only_b:,} only {in_b}; "
                f"{pluralize(agreement.changed_shards, 'shard')} labeled in different versions"
            )
            if note := agreement.disagreements.limit_note:
                facts["Disagreements"] = note
        return facts

    def table(self) -> pa.Table:
        """Returns one row per class; without agreement, `compared_a`, `compared_b` and `same` are null.

        `psi` and `js_divergence` are contributions of the class. Their sums are the PSI and the square of
        the Jensen-Shannon distance.
        """
        drift, classes, agreement = self.drift, self.drift.classes, self.agreement
        none = [pa.nulls(len(classes.labels), pa.int64())] * 3
        agreed = none if agreement is None else [agreement.compared_a, agreement.compared_b, agreement.same]
        indices = pa.array(np.arange(len(classes.labels)))
        columns = {
            "label": pa.array(classes.labels, pa.string()),
            # A model's class id is the position of the class in its list; null if the model lacks the class.
            "label_id_a": pc.index_in(indices, value_set=pa.array(classes.ids_a)),
            "label_id_b": pc.index_in(indices, value_set=pa.array(classes.ids_b)),
            "count_a": drift.count_a,
            "count_b": drift.count_b,
            "fraction_a": drift.fraction_a,
            "fraction_b": drift.fraction_b,
            "psi": drift.psi_by_class,
            "js_divergence": drift.js_divergence_by_class,
            "score_psi": pa.array(drift.class_score_psi, mask=np.isnan(drift.class_score_psi)),
        }
        columns |= zip(("compared_a", "compared_b", "same"), agreed, strict=True)
        return pa.table(columns, metadata={TOTALS: json.dumps(self.totals)})


def limit_violations(
    totals: Mapping[str, Any], limits: Mapping[str, float | None], min_images: int = 1
) -> list[str]:
    """Returns a sentence for each limit that `Comparison.totals` exceed; None means no limit.

    The limits are `max_psi`, `max_js`, `max_score_psi` and `min_agreement`. The limits on drift apply if both
    label sets have at least `min_images` images.
    """
    enough = min(totals["images_a"], totals["images_b"]) >= min_images
    violations = [
        f"{title} {value:.4g} is more than {limit:g}"
        for title, name, limit in (
            ("PSI", "psi", limits.get("max_psi")),
            ("Jensen-Shannon distance", "js_distance", limits.get("max_js")),
            ("PSI of the scores", "score_psi", limits.get("max_score_psi")),
        )
        if enough and limit is not None and not (value := totals[name]) <= limit  # NaN violates any limit
    ]
    agreement, min_agreement = totals.get("agreement"), limits.get("min_agreement")
    if min_agreement is not None and agreement is not None and not agreement >= min_agreement:
        violations.append(f"agreement {agreement:.4g} is less than {min_agreement:g}")
    return violations
