"""One labeling run: job, plan, sequence, gate, cleanup; and what is done with a stored partition.

What a stage does, and how stages run, belongs to `dataflow` and the stages' packages.
"""

from pipeline.dataflow import Stopped
from pipeline.run.job import Job, make_job
from pipeline.run.labeling import label
from pipeline.run.planning import Plan, PreparedRun, ShardState, plan, plan_run
from pipeline.run.recording import RunResult, installed_version
from pipeline.run.stored import find_partition, rebuild, write_report
