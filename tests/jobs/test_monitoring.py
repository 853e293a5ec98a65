"""Tests of monitoring on a cluster: Prometheus metrics and the Grafana dashboard."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command import cvt_label
from tests.makers import make_image, make_tar
from tests.ray_head import RAY, REPOSITORY

pytestmark = pytest.mark.slow

DASHBOARD = json.loads((REPOSITORY / "configs/grafana_dashboard.json").read_text())
SAMPLE = re.compile(r"(ray_cvt_label_\w+)\{(.*)\} (\S+)")


@pytest.fixture(scope="module")
def dataset(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The input of a finished job: 40 images, one invalid image, and a truncated shard."""
    folder = tmp_path_factory.mktemp("monitoring")
    whole = make_tar([(f"{i}.jpg", make_image(i)) for i in range(40)] + [("x.jpg", b"not an image")])
    (folder / "in").mkdir()
    (folder / "in/a.tar").write_bytes(whole)
    (folder / "in/cut.tar").write_bytes(whole[:3000])
    settings = [f"input.uri={folder}/in", f"output.uri={folder}/out", "ray.address=null"]
    settings += ["classify.batch_size=10", "read.chunk_images=20"]
    job = ["python", "-m", "jobs.label", "--config", "configs/demo.yaml"]
    job += [word for setting in settings for word in ("--set", setting)]
    submit = [RAY, "job", "submit", "--address", cluster, "--working-dir", ".", "--", *job]
    done = subprocess.run(submit, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False)
    assert "41 in 1 shard" in done.stdout, done.stdout + done.stderr
    return f"{folder}/in"


def get(url: str) -> str:
    headers = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return str(answer.read().decode())


def targets(cluster: str) -> list[str]:
    """Returns the addresses that Ray exposes to Prometheus."""
    return [
        target for group in json.loads(get(f"{cluster}/api/prometheus/sd")) for target in group["targets"]
    ]


def scraped(cluster: str, dataset: str) -> dict[str, dict[str, float]]:
    """Returns, by metric, the values of a dataset by the labels that this project sets."""
    found: dict[str, dict[str, float]] = {}
    for target in targets(cluster):
        try:
            page = get(f"http://{target}/metrics")
        except OSError:  # a process of Ray that has not started yet
            continue
        for name, labels, value in SAMPLE.findall(page):
            own_labels = dict(re.findall(r'(outcome|stage|state|kind|le|dataset|model)="([^"]*)"', labels))
            if own_labels.pop("dataset") != dataset:
                continue
            assert re.fullmatch(r"fashion-mnist-[0-9a-f]{8}", own_labels.pop("model"))
            found.setdefault(name, {})[" ".join(own_labels.values())] = float(value)
    return found


@pytest.fixture(scope="module")
def metrics(cluster: str, dataset: str) -> dict[str, dict[str, float]]:
    """The metrics, after the last update of the job arrived."""
    deadline = time.monotonic() + 300
    while True:
        found = scraped(cluster, dataset)
        if sum(found.get("ray_cvt_label_shards_total", {}).values()) == 2:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(1)


def test_status_lists_job_of_ray_job_submit(cluster: str, dataset: str) -> None:
    done = cvt_label("status", "--address", cluster)
    assert done.returncode == 0, done.stderr
    assert re.search(r"failed .* 3  raysubmit_\w+\n", done.stdout)


def test_metrics_count_the_processed_images(metrics: dict[str, dict[str, float]]) -> None:
    assert metrics["ray_cvt_label_images_total"] == {"labeled": 40, "error": 1}
    assert metrics["ray_cvt_label_shards_planned_total"] == {"": 2}
    assert metrics["ray_cvt_label_shards_total"] == {"committed": 1, "unreadable": 1}
    # The images before the truncation are in no chunk.
    assert metrics["ray_cvt_label_stage_images_total"]["commit"] == 41
    assert metrics["ray_cvt_label_stage_images_total"]["storage"] == 41
    assert set(metrics["ray_cvt_label_stage_bytes_total"]) == {"storage", "decode", "classify", "commit"}
    seconds = metrics["ray_cvt_label_stage_seconds_total"]
    assert min(seconds[f"{stage} busy"] for stage in ("storage", "decode", "classify", "commit")) > 0
    assert metrics["ray_cvt_label_batch_seconds_count"][""] >= 4


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_dashboard_queries_existing_metrics(metrics: dict[str, dict[str, float]]) -> None:
    queried = {name for text in expressions() for name in re.findall(r"ray_cvt_label_\w+", text)}
    assert queried - {"ray_cvt_label_storage_retries_total"} <= set(metrics)  # no retry happened
    assert set(metrics) - queried <= {
        "ray_cvt_label_batch_seconds_count",
        "ray_cvt_label_batch_seconds_sum",
        "ray_cvt_label_stage_images_total",
    }
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(panel["title"] and panel["description"] is not None for panel in DASHBOARD["panels"])


def test_dashboard_is_valid_for_grafana_types() -> None:
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    loaded = json.loads(encoder.JSONEncoder().encode(models.Dashboard.from_json(DASHBOARD)))
    assert_within(DASHBOARD, loaded)


def assert_within(part: Any, whole: Any) -> None:
    if isinstance(part, dict):
        for name, value in part.items():
            assert_within(value, whole[name])
    elif isinstance(part, list):
        assert len(part) == len(whole)
        for one, other in zip(part, whole, strict=True):
            assert_within(one, other)
    else:
        assert part == whole


@pytest.fixture
def prometheus(cluster: str, metrics: dict[str, dict[str, float]], tmp_path: Path) -> Iterator[str]:
    """A real Prometheus that scrapes the cluster every second."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    scrape = {"job_name": "ray", "scrape_interval": "1s", "static_configs": [{"targets": targets(cluster)}]}
    (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape]}))
    options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([binary, *options], cwd=tmp_path, stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(120)


def test_every_panel_has_data_in_prometheus(prometheus: str, dataset: str) -> None:
    """Rates may be 0 or missing, because the run is finished."""
    variables = {"$dataset": dataset, "$model": ".*", "$__rate_interval": "10s", "$__range": "1m"}

    def answer(expression: str) -> list[dict[str, Any]]:
        for name, value in variables.items():
            expression = expression.replace(name, value)
        query = urllib.parse.urlencode({"query": expression})
        try:
            found = json.loads(get(f"{prometheus}/api/v1/query?{query}"))
        except OSError:  # not started yet
            return []
        assert found["status"] == "success", found
        return list(found["data"]["result"])

    deadline = time.monotonic() + 300
    waiting = [text for text in expressions() if "retries" not in text]
    while waiting:
        assert time.monotonic() < deadline, waiting
        waiting = [text for text in waiting if not answer(text)]
        time.sleep(0.5)
    assert answer('sum(ray_cvt_label_images_total{dataset="$dataset"})')[0]["value"][1] == "41"
