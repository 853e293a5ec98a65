"""The section of the page about a comparison with another label set."""

from pipeline.report.parts import Bars, Chart, Histogram, Section
from pipeline.report.sections import MOST_PAIRS, bin_rows
from pipeline.statistics import Comparison, Drift
from pipeline.text import number, percent

MOST_CHANGED = 15


def comparison(found: Comparison, number_in_page: int) -> Section:
    """How the labels of the page, b of the comparison, differ from others: drift, and agreement."""
    agreement, labels = found.agreement, found.drift.classes.labels
    section = Section(f"against-{number_in_page}", f"Against {_other(found)}")
    there = "all labels" if found.a.run is None else "what that run labeled and no later run relabeled"
    section.facts["There"] = f"{there}: {found.a.name}"
    section.facts["Here"] = "all labels" if found.b.run is None else "what this run labeled"
    section.facts |= found.facts("there", "here")
    section.charts += [_changed(found.drift), _score_drift(found.drift)]
    if agreement is not None and (pairs := agreement.disagreements.top(MOST_PAIRS)):
        rows = [
            [labels[b], labels[a], number(count), percent(count / agreement.compared)]
            for a, b, count in pairs
        ]
        columns = ["Here", "There", "Images", "Of those compared"]
        section.charts.append(Chart("Most frequent disagreements", columns, rows, names=2))
    return section


def _other(found: Comparison) -> str:
    """What these labels are compared with, for a heading."""
    a, b = found.a, found.b
    if a.uri != b.uri:
        return a.folder if a.run is None else f"{a.folder}, run {a.run}"
    if a.run is None:
        return "all labels"
    return f"run {a.run}" if b.run is None else "the previous run"


def _changed(drift: Drift) -> Chart:
    chosen, parts = drift.most_changed(MOST_CHANGED), drift.psi_parts
    names = [drift.classes.labels[i] for i in chosen]
    here, there = drift.fraction_b[chosen].tolist(), drift.fraction_a[chosen].tolist()
    shares = list(zip(names, map(percent, here), map(percent, there), strict=True))
    return Chart(
        "Classes whose share changed most",
        ["Class", "Images here", "Images there", "Share here", "Share there", "PSI"],
        [
            [name, number(drift.count_b[i]), number(drift.count_a[i]), b, a, f"{parts[i]:.4f}"]
            for i, (name, b, a) in zip(chosen, shares, strict=True)
        ],
        Bars(names, [("here", here), ("there", there)], "share of the images", "{:.1%}".format),
        "; ".join(f"{name}: {b} here, {a} there" for name, b, a in shares[:5]),
    )


def _score_drift(drift: Drift) -> Chart:
    here, there = ((s.sum(axis=0) / s.sum()).tolist() for s in (drift.scores_b, drift.scores_a))
    return Chart(
        "Scores, here and there",
        ["Score", "Share here", "Share there"],
        bin_rows([*map(percent, here)], [*map(percent, there)]),
        Histogram([("here", here), ("there", there)], "{:.0%}".format),
        f"The population stability index is {drift.score_psi:.4f}.",
    )
