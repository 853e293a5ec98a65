"""Runs the stages on Ray Data or in this process; resources, metrics, shutdown.

`dataflow.ray_executor` imports Ray and is imported by its module name.
"""

from pipeline.dataflow.executor import Executor, open_executor, without_cluster
from pipeline.dataflow.ray_cluster import LOCAL, ClusterError, check_reachable, ray_address
from pipeline.dataflow.resources import ClusterCapacity, ResourceRequest, Resources, choose_resources
from pipeline.dataflow.stages import Stages
from pipeline.dataflow.stopping import (
    StopController,
    Stopped,
    graceful_stop,
    interrupts_deferred,
    sigterm_interrupts,
)
