"""The Airflow example: `cvt-label submit` accepts its command line, and Airflow loads the DAG."""

from __future__ import annotations

import os
import runpy
import shlex
import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jinja2
import pytest
import typer

from jobs.cli import make_app
from jobs.console import add_command
from jobs.submit import submit
from pipeline.config import Config, load_config
from pipeline.schedule import Submission

DAG = Path(__file__).parents[2] / "configs" / "airflow_dag.py"


def test_command_of_the_dag_submits_one_tick_per_try(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[dict[str, Any]] = []
    sdk, bash = ModuleType("airflow.sdk"), ModuleType("airflow.providers.standard.operators.bash")
    sdk.DAG = lambda *_, **__: nullcontext()  # type: ignore[attr-defined]
    bash.BashOperator = lambda **options: tasks.append(options)  # type: ignore[attr-defined]
    parts = bash.__name__.split(".")
    for name in (".".join(parts[:count]) for count in range(1, len(parts))):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (sdk, bash):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    runpy.run_path(str(DAG))
    (task,) = tasks
    assert task["append_env"] is True  # the cluster's address and token come from the environment

    context = {
        "dag_run": SimpleNamespace(run_after=datetime(2026, 11, 23, 2, tzinfo=UTC)),
        "task_instance": SimpleNamespace(try_number=2),
    }
    words = shlex.split(jinja2.Template(task["bash_command"]).render(context))
    assert words[:3] == ["exec", "cvt-label", "submit"]
    app = make_app()
    add_command(app, submit)
    parsed = typer.main.get_command(app).make_context("submit", words[3:]).params
    assert parsed["wait"] is True
    config = load_config(Config, None, ["input.uri=/in", "output.uri=/out", "model.path=fashion-mnist"])
    assert Submission(config, parsed["idempotency_key"]).id.endswith("-20261123T0200-2")


def test_airflow_loads_the_dag() -> None:
    airflow_models = pytest.importorskip("airflow.dag_processing.dagbag", reason="Airflow is not installed")
    bag = airflow_models.DagBag(os.fspath(DAG))
    assert not bag.import_errors
    (dag,) = bag.dags.values()
    assert [task.task_id for task in dag.tasks] == ["label"]
    assert dag.catchup is False
    assert dag.max_active_runs == 1
