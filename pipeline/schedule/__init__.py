"""Jobs on a Ray cluster: submission, and a scheduler with cron expressions.

The labeling run itself belongs to `run`.
"""

from pipeline.schedule.client import JobClient, SubmissionRefusedError, SubmittedJob, UnknownJobError
from pipeline.schedule.scheduler import DatasetState, Scheduler, StateFile, next_ticks
from pipeline.schedule.submission import Submission, minute_tick
