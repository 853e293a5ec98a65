"""The stored partition: prediction files, manifest, lease, run records, and recovery after a crash.

Planning what to label does not belong here.
"""

from pipeline.commit.committer import MAX_CONCURRENT_WRITES, Committer, Progress, Totals
from pipeline.commit.lease import Lease, LeaseHeldError, LeaseLostError, was_clean_shutdown
from pipeline.commit.manifest import Manifest, ManifestRow
from pipeline.commit.manifest_writer import ManifestWriter
from pipeline.commit.partition import CLASS_STATS, Partition, open_partition
from pipeline.commit.prediction_files import PredictionWriter
from pipeline.commit.record import RunRecord, new_run_id
from pipeline.commit.recovery import Repairs, find_repairs, rebuilt_rows, reconcile, recovered_rows
