"""Connects to the Ray that runs the job: a given cluster, the one of the submitted job, or a local Ray."""

import logging
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, chdir, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.config import IN_PROCESS, ConfigError
from pipeline.dataflow.stopping import interrupts_deferred, sigterm_interrupts
from pipeline.storage import temporary_folder

#: Address of a Ray that this process starts on its machine.
LOCAL = "local"

#: Default environment variables. Ray's core writes only one line, with this level, to the terminal, which
#: shows the progress of the job. Errors are raised, and the logs are in Ray's session folder.
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
#: The same for a local Ray. Idle workers stay for a minute, instead of starting a process per chunk. All
#: processes listen on loopback only: despite its name, the variable works on Linux too. Workers use this
#: interpreter, also under `uv run`, where Ray would pack the working directory. Ray searches its node for
#: 30 seconds in total. Short attempts let Ctrl-C end the search between two of them. The newer autoscaler,
#: the default of `ray start`, ends at once; `ray.shutdown` would wait for the other one for a second.
_LOCAL_ENVIRONMENT = {
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_raylet_start_wait_time_s": "5",
    "RAY_enable_autoscaler_v2": "1",
}

#: Variables with which a user selects how Ray authenticates clients.
_AUTHENTICATION = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}

_CONNECT_TIMEOUT_S = 10
#: Seconds after which a worker process of Ray must have run a first task.
_WORKER_TIMEOUT_S = 50.0
#: Maximum length of the path of the folder for temporary files, so that the paths of Ray's sockets fit.
_MAX_FOLDER_BYTES = 18
#: Number of lines of Ray's logs in a message.
_LOG_LINES = 10
#: The directory that contains the packages of this project.
_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("cvt", "pipeline", "jobs", "configs")


class ClusterError(ConnectionError):
    """Ray does not start, no Ray cluster answers at an address, or the cluster refuses a request."""


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Connects to Ray inside the block, and stops a local Ray afterwards; keeps an existing connection.

    Args:
        address: see `ray_address`.

    Raises:
        ClusterError: no cluster answers at the address, or a local Ray or the workers of Ray do not start.
        ConfigError: the address is `in-process`, which only labeling supports.
    """
    if address == IN_PROCESS:
        raise ConfigError(f"ray.address: only labeling supports {IN_PROCESS!r}; use null or 'local'")
    address = ray_address(address)
    environment = _ENVIRONMENT
    if address == LOCAL:
        environment = _ENVIRONMENT | _LOCAL_ENVIRONMENT
        if not os.environ.keys() & _AUTHENTICATION:
            # Without a token, Ray writes one to the home folder, and every later Ray on this machine requires
            # it. Ray reads its token only once, so the token is that of all local Rays of this process.
            environment |= {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    with interrupts_deferred():  # an interrupted import leaves a broken module
        import ray  # reads its environment variables once, during this import

    if ray.is_initialized():
        yield
        return
    check_reachable(address)
    # The outer `sigterm_interrupts` removes the handlers of Ray at the end.
    session = _session_folder() if address == LOCAL else nullcontext()
    with sigterm_interrupts(), session as folder:
        # Ray makes its folder accessible to all, so it is one in the private folder.
        local = {} if folder is None else {"include_dashboard": False, "_temp_dir": f"{folder}/r"}
        try:
            init_ray(address, logging_level=logging.ERROR, log_to_driver=False, **local)
            with sigterm_interrupts():  # ray.init has set another handler
                first = ray.remote(num_cpus=0)(_do_nothing).remote()
                import ray.data  # takes a second; sets the log level of Ray Data

                logging.getLogger("ray.data").setLevel(logging.ERROR)
                if address == LOCAL:  # a cluster may install a runtime environment for many minutes
                    wait_for_worker(first)
                yield
        finally:
            with interrupts_deferred():  # an interrupt would leave processes behind
                ray.shutdown()


def _session_folder() -> AbstractContextManager[Path]:
    """Creates a private folder for a local Ray. After an error, its logs stay there until the next run."""
    if "RAY_TMPDIR" in os.environ:  # selects another folder
        return nullcontext(Path(os.environ["RAY_TMPDIR"]))
    parent = tempfile.gettempdir()
    is_short = len(os.fsencode(parent)) <= _MAX_FOLDER_BYTES
    return temporary_folder(parent if is_short else "/tmp", keep_on_error=True)


def _do_nothing() -> None:
    """The first task: a worker that runs it has started and imports this package."""


def wait_for_worker(task: Any, timeout: float = _WORKER_TIMEOUT_S) -> None:
    """Waits for a task of a local Ray; raises `ClusterError` with the end of its logs if no worker runs it.

    Without a first task, a run whose workers cannot start would wait for its first result for many minutes.
    """
    import ray

    try:
        ray.get(task, timeout=timeout)
    except ray.exceptions.RayError as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        if isinstance(error, ray.exceptions.GetTimeoutError):
            cause = f"no worker process has started within {timeout:g} s"
        context = ray.get_runtime_context()
        logs = Path(context.get_temp_dir(), context.get_session_name(), "logs")
        files = sorted(logs.glob("*.err"), key=lambda path: path.stat().st_mtime)
        lines = [line for file in files for line in file.read_text(errors="replace").splitlines()]
        shown = " | ".join([line for line in lines if line.strip() and line[0] != ":"][-_LOG_LINES:])
        raise ClusterError(f"the workers of Ray do not start: {cause}; end of the logs: {shown}") from None


def ray_address(address: str | None) -> str:
    """Returns the address, or for None that in `RAY_ADDRESS`, which `ray job submit` sets, else `local`."""
    return address or os.environ.get("RAY_ADDRESS") or LOCAL


def init_ray(address: str, **options: Any) -> None:
    """Calls `ray.init`, a second time if a local Ray does not start in time on a busy machine.

    Workers import this project's packages from any working directory.

    Raises:
        ClusterError: Ray does not start, or the cluster cannot be used.
        KeyboardInterrupt: SIGTERM or Ctrl-C arrived; the processes that Ray has started are stopped.
    """
    import ray

    for is_last in (address != LOCAL, True):
        # Workers search the driver's working directory first.
        directory = chdir(_ROOT) if _is_shadowed() else nullcontext()
        try:
            with directory, _new_processes_stopped():
                ray.init(address=address, **options)
            return
        except SystemExit:  # raised by Ray's handler of SIGTERM
            raise KeyboardInterrupt from None
        except Exception as error:  # Ray has no narrower type for its errors
            ray.shutdown()
            if is_last or "timed out during startup" not in str(error):
                cause = " ".join(str(error).split())
                if address != LOCAL:
                    raise ClusterError(f"cannot use the Ray cluster at {address}: {cause}") from error
                remedy = "run the command again when the machine is less busy, or label with --no-ray"
                raise ClusterError(
                    f"Ray does not start on this machine: {cause} To continue: {remedy}"
                ) from error


@contextmanager
def _new_processes_stopped() -> Iterator[None]:
    """Kills the processes that the block has started, if the block fails: Ray forgets them then."""
    import psutil  # comes with Ray

    this = psutil.Process()
    before = set(this.children(recursive=True))
    try:
        yield
    except BaseException:
        signal.alarm(0)  # with which Ray's core would end the process 3 seconds after SIGTERM
        for process in set(this.children(recursive=True)) - before:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        raise


def _is_shadowed() -> bool:
    """Returns whether the working directory may have other packages with the names of this project's."""
    names = (name for package in _PACKAGES for name in (package, f"{package}.py"))
    return Path.cwd() != _ROOT and any(Path(name).exists() for name in names)


def check_reachable(address: str) -> None:
    """Raises `ClusterError` if no server listens at an address with a port; Ray would retry for minutes."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        raise ClusterError(f"{address}: not an address: the port is not a number") from None
    if not parts.hostname or port is None:  # for example "auto"
        return
    try:
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster answers at {address}: {error}") from None
