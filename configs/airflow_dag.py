"""An Airflow 3 DAG that labels a dataset every night on a permanent Ray cluster, with `cvt-label submit`.

Airflow's workers need this project (`pip install`), the configuration file, and these environment variables:
RAY_API_SERVER_ADDRESS (URL of the cluster's dashboard), RAY_AUTH_MODE and RAY_AUTH_TOKEN. The cluster has its
own credentials for the storage.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

#: Each attempt is a separate job. It is refused (status 6) while the job of an earlier attempt or night runs.
KEY = "{{ dag_run.run_after.strftime('%Y%m%dT%H%M') }}-{{ task_instance.try_number }}"

with DAG(
    "label_images",
    schedule="0 2 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,  # one run labels all new shards, even after several missed nights
    max_active_runs=1,
):
    BashOperator(
        task_id="label",
        bash_command=f"exec cvt-label submit --config /etc/cvt-label/job.yaml --idempotency-key {KEY}",
        append_env=True,
        retries=2,
        retry_delay=timedelta(minutes=5),
        execution_timeout=timedelta(hours=20),
    )
