"""One labeling run: job, plan, sequence, gate, summaries, cleanup.

What a stage does, and how stages run, belongs to `dataflow` and the stages' packages.
"""

from pipeline.dataflow import Stopped
from pipeline.run.job import Job, make_job
from pipeline.run.labeling import label
from pipeline.run.partitions import find_partition
from pipeline.run.planning import Plan, State, plan
from pipeline.run.preparing import PreparedRun, plan_run
from pipeline.run.rebuilding import rebuild
from pipeline.run.recording import installed_version
from pipeline.run.reporting import write_report
from pipeline.run.result import RunResult
