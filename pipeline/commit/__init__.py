"""What is stored of a partition: prediction files, manifest, lease, run records, and recovery after a crash.

Deciding what to label does not belong here.
"""

from pipeline.commit.committer import WRITERS, Committer, Progress, Totals
from pipeline.commit.lease import Lease, LeaseHeldError, LeaseLostError, left_in_order
from pipeline.commit.manifest import Manifest, ManifestRow, ManifestWriter
from pipeline.commit.partition import CLASS_STATS, Partition, open_partition
from pipeline.commit.prediction_files import PredictionWriter
from pipeline.commit.record import RunRecord, new_run_id
from pipeline.commit.recovery import Repairs, find_repairs, prediction_files, rebuilt_rows, reconcile
