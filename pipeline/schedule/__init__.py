"""Jobs on a Ray cluster: submission, and a scheduler with cron expressions.

The labeling run itself belongs to `run`.
"""

from pipeline.schedule.scheduler import DatasetState, Scheduler, next_ticks, read_state, state_uri
from pipeline.schedule.submission import (
    Cluster,
    Job,
    Submission,
    SubmissionRefusedError,
    UnknownJobError,
    minute_tick,
)

__all__ = [
    "Cluster",
    "DatasetState",
    "Job",
    "Scheduler",
    "Submission",
    "SubmissionRefusedError",
    "UnknownJobError",
    "minute_tick",
    "next_ticks",
    "read_state",
    "state_uri",
]
