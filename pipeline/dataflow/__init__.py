"""How the stages run: on Ray Data or in this process; resources, metrics, shutdown.

`dataflow.ray_executor` imports Ray and is imported by its module name. What a stage does to a sample
belongs to `read`, `decode`, `classify` and `commit`.
"""

from pipeline.dataflow.executor import Executor, open_executor
from pipeline.dataflow.ray_cluster import ClusterError, check_reachable
from pipeline.dataflow.resources import Cluster, ResourceRequest, Resources, choose_resources
from pipeline.dataflow.stages import Stages
from pipeline.dataflow.stopping import Stop, Stopped, graceful_stop, interrupts_deferred, sigterm_interrupts
