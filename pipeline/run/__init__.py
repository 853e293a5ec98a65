"""One labeling run (job, plan, steps, gate, cleanup), and operations on a stored partition.

The stages and the code that runs them are in `dataflow` and in the packages of the stages.
"""

from pipeline.dataflow import Stopped
from pipeline.run.job import Job, make_job
from pipeline.run.labeling import label
from pipeline.run.planning import Plan, PreparedRun, ShardState, plan, plan_run
from pipeline.run.recording import Phase, RunResult, installed_version
from pipeline.run.stored import find_last_runs, find_partition, rebuild, write_report
