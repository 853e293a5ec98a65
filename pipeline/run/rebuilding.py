"""Manifest and class statistics regenerated from the prediction files and the records of runs."""

from pipeline.commit import Lease, Partition, new_run_id, rebuilt_rows
from pipeline.dataflow import sigterm_interrupts
from pipeline.run.summaries import write_class_table

#: Seconds after which the lease of a rebuild expires unless it is renewed.
LEASE_S = 60.0


def rebuild(partition: Partition) -> None:
    """Regenerates the manifest and the class statistics of a partition.

    Raises:
        StorageError: the partition can't be read or written, or has no prediction file.
        LeaseHeldError: a run is at work.
        LeaseLostError: a run has taken over.
    """
    storage, uri = partition.storage, partition.uri
    lease = Lease(storage, uri, new_run_id(), LEASE_S)
    with sigterm_interrupts(), lease.held():
        partition.manifest.replace(lambda: rebuilt_rows(storage, uri))
        lease.verify()
        write_class_table(partition, partition.manifest.fold_statistics(), partition.topk())
        lease.left_in_order = True
