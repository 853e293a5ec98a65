"""The run's report for people: one self-contained HTML page that opens without a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jinja2

from pipeline.stages import bound_by

if TYPE_CHECKING:
    from pipeline.labelling import RunResult


def percent(value: float | None) -> str:
    """A share, for people."""
    return "-" if value is None else f"{value:.1%}"


def score(value: float | None) -> str:
    """A score, for people."""
    return "-" if value is None else f"{value:.3f}"


_TEMPLATES = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_TEMPLATES.filters.update(percent=percent, score=score)

_PAGE = _TEMPLATES.from_string(
    """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Labels by {{ model }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: bold; padding: .5rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #8884; text-align: right; }
th:first-child, td:first-child { text-align: left; }
dt { font-weight: bold; } dd { margin: 0 0 .5rem; overflow-wrap: anywhere; }
meter { width: 100%; min-width: 4rem; }
</style>
</head>
<body>
<h1>Labels by {{ model }}</h1>
<dl>
{% for name, value in facts.items() %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
{% if unreadable %}
<h2>Shards that could not be read</h2>
<ul>
{% for row in unreadable %}
<li>{{ row.error }}</li>
{% endfor %}
</ul>
{% endif %}
<h2>Classes</h2>
<table>
<caption>{{ classes | length }} classes occur, of {{ class_count }}</caption>
<thead>
<tr><th scope="col">Label</th><th scope="col">Images</th><th scope="col" colspan="2">Share</th>
<th scope="col">Mean score</th><th scope="col">5 %</th><th scope="col">50 %</th><th scope="col">95 %</th>
{% if has_targets %}
<th scope="col">Precision</th><th scope="col">Recall</th><th scope="col">F1</th>
{% endif %}
</tr>
</thead>
<tbody>
{% for row in classes %}
<tr><th scope="row">{{ row.label }}</th><td>{{ "{:,}".format(row.count) }}</td>
<td>{{ row.fraction | percent }}</td>
<td><meter min="0" max="1" value="{{ row.fraction or 0 }}"></meter></td>
<td>{{ row.score_mean | score }}</td><td>{{ row.score_p05 | score }}</td>
<td>{{ row.score_p50 | score }}</td><td>{{ row.score_p95 | score }}</td>
{% if has_targets %}
<td>{{ row.precision | percent }}</td><td>{{ row.recall | percent }}</td><td>{{ row.f1 | score }}</td>
{% endif %}
</tr>
{% endfor %}
</tbody>
</table>
</body>
</html>
"""
)


def occurring(classes: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The classes that were predicted or are somebody's target, the most frequent first."""
    seen = [row for row in classes if row["count"] or row["support"]]
    return sorted(seen, key=lambda row: (-row["count"], row["label_id"]))


def render_report(result: RunResult) -> str:
    """The page for a run; whatever comes from data is escaped."""
    partition, stats, totals = result.plan.partition, result.statistics, result.totals
    assert stats is not None
    classes = result.class_table.to_pylist()
    facts = {
        "Input": partition.config.input.uri,
        "Output": partition.uri,
        "Run": result.run,
        "Fingerprint": partition.fingerprint,
        "This run": f"{totals.images:,} images in {totals.shards:,} shards; {totals.errors:,} errors",
        "In all": f"{int(stats.count.sum()):,} labelled images",
    }
    if result.stages:
        facts |= {"Decoded by": result.decoder, "Bound by": bound_by(result.stages)}
    if result.gpu_utilisation is not None:
        facts["GPU utilisation"] = percent(result.gpu_utilisation)
    if stats.has_targets:
        facts["Top-1 accuracy"] = percent(stats.top1_accuracy())
        facts["Top-5 accuracy"] = percent(stats.top5_accuracy(partition.config.output.topk))
    return _PAGE.render(
        model=partition.checkpoint.name,
        facts=facts,
        unreadable=totals.unreadable,
        classes=occurring(classes),
        class_count=len(classes),
        has_targets=stats.has_targets,
    )
