"""One labeling run: job, plan, sequence, gate, summaries, cleanup.

What a stage does, and how stages run, belongs to `dataflow` and the stages' packages.
"""

from pipeline.run.job import Job, make_job
from pipeline.run.labelling import Plan, RunResult, Stopped, make_plan, run_labelling
from pipeline.run.planning import State, Work, compare
from pipeline.run.recording import installed_version

__all__ = [
    "Job",
    "Plan",
    "RunResult",
    "State",
    "Stopped",
    "Work",
    "compare",
    "installed_version",
    "make_job",
    "make_plan",
    "run_labelling",
]
