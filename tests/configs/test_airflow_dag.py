"""The Airflow example's own logic against a real cluster, without Airflow."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from configs import airflow_dag
from configs.airflow_dag import JobFailed, job_name, label_once

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


@pytest.fixture(scope="module")
def client(cluster: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(cluster)


def test_a_date_has_one_name_wherever_it_is_told() -> None:
    moment = datetime(2026, 11, 23, 2, tzinfo=UTC)
    assert job_name("label-images", moment) == "label-images-20261123T0200"
    assert job_name("label-images", moment.astimezone(timezone(timedelta(hours=9)))) == job_name(
        "label-images", moment
    )


def test_a_date_runs_once_however_often_it_is_asked_for(client: JobSubmissionClient, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    # The variable that is to reach Ray's supervisor of the job does.
    entrypoint = f'test "$RAY_JOB_STOP_WAIT_TIME_S" = 80 && echo once >> {ran}'
    assert label_once(client, "night", entrypoint) == "night-1"
    assert label_once(client, "night", f"echo twice >> {ran}") == "night-1"
    assert ran.read_text() == "once\n"


def test_a_job_that_is_running_is_followed_and_not_started_again(
    client: JobSubmissionClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ran = tmp_path / "ran"
    client.submit_job(entrypoint=f"sleep 3; echo awake; echo once >> {ran}", submission_id="long-1")
    with caplog.at_level("INFO"):
        assert label_once(client, "long", f"echo twice >> {ran}") == "long-1"
    assert ran.read_text() == "once\n"
    assert "awake" in caplog.messages


def test_a_job_that_failed_fails_the_task_and_the_next_try_is_another_job(
    client: JobSubmissionClient, tmp_path: Path
) -> None:
    with pytest.raises(JobFailed, match="job bad-1: FAILED, exit status 3") as caught:
        label_once(client, "bad", "exit 3")
    assert caught.value.exit_status in airflow_dag.HOPELESS
    assert label_once(client, "bad", "exit 0") == "bad-2"
    assert label_once(client, "bad", "exit 3") == "bad-2"


def test_airflow_loads_the_dag() -> None:
    airflow_models = pytest.importorskip("airflow.dag_processing.dagbag", reason="Airflow is not installed")
    bag = airflow_models.DagBag(os.fspath(Path(airflow_dag.__file__)))
    assert not bag.import_errors
    (dag,) = bag.dags.values()
    assert [task.task_id for task in dag.tasks] == ["label"]
    assert dag.catchup is False
    assert dag.max_active_runs == 1
