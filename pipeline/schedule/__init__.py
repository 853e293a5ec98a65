"""Jobs on a Ray cluster: submission, and a scheduler with cron expressions.

The labeling run itself belongs to `run`.
"""

from pipeline.schedule.client import (
    JobClient,
    Submission,
    SubmissionRefusedError,
    SubmittedJob,
    UnknownJobError,
    minute_key,
)
from pipeline.schedule.scheduler import DatasetState, Scheduler, StateFile, next_scheduled_times
