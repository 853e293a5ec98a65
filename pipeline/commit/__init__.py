"""What is stored of a partition: prediction files, manifest, lease, run records, and recovery after a crash.

Deciding what to label does not belong here.
"""

from pipeline.commit.committer import WRITERS, Committer, Progress, Target, Totals
from pipeline.commit.lease import Lease, LeaseHeldError, LeaseLostError, left_in_order
from pipeline.commit.manifest import Known, Manifest, ManifestRow, read_known
from pipeline.commit.manifest_writer import ManifestWriter
from pipeline.commit.partition import Partition
from pipeline.commit.record import RunRecord, new_run_id, read_record
from pipeline.commit.recovery import Repairs, find_repairs, prediction_files, rebuilt_rows, reconcile

__all__ = [
    "WRITERS",
    "Committer",
    "Known",
    "Lease",
    "LeaseHeldError",
    "LeaseLostError",
    "Manifest",
    "ManifestRow",
    "ManifestWriter",
    "Partition",
    "Progress",
    "Repairs",
    "RunRecord",
    "Target",
    "Totals",
    "find_repairs",
    "left_in_order",
    "new_run_id",
    "prediction_files",
    "read_known",
    "read_record",
    "rebuilt_rows",
    "reconcile",
]
