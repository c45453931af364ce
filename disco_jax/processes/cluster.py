"""How the processes of a run find each other: from flags, or from the launcher."""

import math
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from disco_jax.errors import UserError

# JAX aborts when it misses a process, with a stack trace instead of a name, so the watchers
# (peers.py) have to be faster.
MISSING_LATER = 30  # seconds
SILENT_LATER = 100.0  # seconds, or thrice peer_timeout


@dataclass(frozen=True)
class Launch:
    """How a process was started. What is None is detected by JAX (`locate`)."""

    source: str  # where this was found, for messages
    name: str  # shared by all processes of this start, and by no other start
    coordinator: str | None = None  # HOST:PORT of process 0
    count: int | None = None
    index: int | None = None
    local_devices: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Rank:
    """A process's rank among those of its run."""

    name: str  # of this start, as in Launch
    host: str  # the address of process 0
    port: int  # where the watchers meet on that host
    index: int
    count: int
    local_devices: tuple[int, ...] | None = None


def find(
    coordinator: str | None,
    count: int | None,
    index: int | None,
    env: Mapping[str, str],
    has_tpu: bool = False,
) -> Launch | None:
    """Returns how this process was started, or None if it is the only one.

    Tried in this order: the three flags; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID (or JOB_COMPLETION_INDEX, which Kubernetes sets in an Indexed Job and JobSet);
    Slurm's srun; Open MPI's mpirun; a Cloud TPU.

    Raises:
      UserError: if the settings are incomplete or a value is not a number.
    """
    if (coordinator, count, index) != (None, None, None):
        return _from_flags(coordinator, count, index)
    if address := env.get("JAX_COORDINATOR_ADDRESS"):
        return _checked(
            Launch(
                "environment",
                address,
                address,
                _number(env, "JAX_NUM_PROCESSES"),
                _number(env, "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX"),
            )
        )
    given = [name for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if name in env]
    if given and env.get("JAX_NUM_PROCESSES") != "1":
        raise UserError(
            f"{' and '.join(given)} set without JAX_COORDINATOR_ADDRESS=HOST:PORT; each "
            "process would train on its own"
        )
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        count, index = _number(env, "SLURM_NTASKS"), _number(env, "SLURM_PROCID")
        parts = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        name = ".".join(env.get(part, "0") for part in parts)
        return Launch("slurm", name, None, count, index, _slurm_devices(env))
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        if "OMPI_MCA_orte_hnp_uri" in env:
            count, index = (_number(env, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
            return Launch("ompi", env["OMPI_MCA_orte_hnp_uri"].split(";")[0], None, count, index)
        # Open MPI 5 sets the ranks but no address, so only the address has to be passed.
        raise UserError(
            "mpirun did not set the address of process 0; set JAX_COORDINATOR_ADDRESS=HOST:PORT, "
            f"JAX_NUM_PROCESSES={env['OMPI_COMM_WORLD_SIZE']} and "
            "JAX_PROCESS_ID=$OMPI_COMM_WORLD_RANK"
        )
    # On a Cloud TPU the workers' names come from the environment or the metadata server.
    if has_tpu and len(env.get("TPU_WORKER_HOSTNAMES", ",").split(",")) > 1:
        return Launch("tpu", "tpu")
    return None


def _from_flags(coordinator: str | None, count: int | None, index: int | None) -> Launch:
    flags = {
        "--coordinator=HOST:PORT": coordinator,
        "--process_count=N": count,
        "--process_index=I": index,
    }
    if missing := [flag for flag, value in flags.items() if value is None]:
        raise UserError(f"{' and '.join(missing)} missing; set all three flags or none")
    return _checked(Launch("flags", str(coordinator), coordinator, count, index))


def _checked(launch: Launch) -> Launch:
    assert launch.coordinator is not None
    assert launch.count is not None
    assert launch.index is not None
    host, _, port = launch.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"the coordinator {launch.coordinator!r} must be HOST:PORT")
    if not 0 <= launch.index < launch.count:
        raise UserError(
            f"process_index is {launch.index}; it must be at least 0 and less than "
            f"process_count, {launch.count}"
        )
    return launch


def _number(env: Mapping[str, str], *names: str) -> int:
    found = next((name for name in names if name in env), None)
    if found is None:
        raise UserError(f"{' or '.join(names)} is not set; each of several processes needs it")
    if not env[found].isdigit():
        raise UserError(f"{found} is {env[found]!r}; it must be a number")
    return int(env[found])


def _slurm_devices(env: Mapping[str, str]) -> tuple[int, ...] | None:
    """All GPUs of a node with a single task; otherwise None for JAX's default, one GPU per task."""
    alone = env.get("SLURM_STEP_NUM_NODES") == env["SLURM_NTASKS"]
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    return tuple(range(int(gpus))) if alone and gpus.isdigit() and int(gpus) else None


def locate(launch: Launch, timeout: float) -> Rank:
    """Returns this process's rank. JAX detects what Slurm, Open MPI or a Cloud TPU have not said.

    Raises:
      UserError: if JAX can't detect it within `timeout` seconds, or this version of JAX does not
        have the function. It is private, because the public one connects the processes at once.
    """
    address, count, index, devices = (
        launch.coordinator,
        launch.count,
        launch.index,
        launch.local_devices,
    )
    if address is None:
        import jax

        try:
            from jax._src.clusters import ClusterEnv

            method = launch.source if launch.source in ("slurm", "ompi") else None
            address, count, index, found = ClusterEnv.auto_detect_unset_distributed_params(
                None, count, index, devices, method, math.ceil(timeout)
            )
            devices = None if found is None else tuple(found)
        except (ImportError, AttributeError, TypeError) as error:
            raise UserError(
                f"jax {jax.__version__} is not supported by DisCo-JAX ({error}); install a version "
                "that requirements.txt allows, or set --coordinator, --process_count and "
                "--process_index"
            ) from error
        except (RuntimeError, OSError) as error:
            raise UserError(f"process 0 was not found ({launch.source}): {error}") from error
    if address is None or count is None or index is None:
        raise UserError(
            f"the processes of this run were not found ({launch.source}); set --coordinator, "
            "--process_count and --process_index"
        )
    host, _, port = address.rpartition(":")
    return Rank(launch.name, host.strip("[]"), int(port), index, count, devices)


def free_port() -> int:
    """Returns a port of this host on which nothing listens."""
    with socket.create_server(("", 0)) as opened:
        return opened.getsockname()[1]


def start(rank: Rank, port: int, start_timeout: float = 300.0, peer_timeout: float = 30.0) -> None:
    """Connects this process to the others. Must be called before JAX is first used.

    Args:
      rank: This process's rank.
      port: A free port of process 0's host, for JAX's coordinator.
      start_timeout: Seconds to wait for all processes.
      peer_timeout: Seconds without a sign of life after which a process is lost.

    Raises:
      UserError: if the processes cannot connect.
    """
    import jax

    host = f"[{rank.host}]" if ":" in rank.host else rank.host
    try:
        with warnings.catch_warnings():  # about the kubernetes client, which is not needed
            warnings.simplefilter("ignore")
            jax.distributed.initialize(
                f"{host}:{port}",
                rank.count,
                rank.index,
                local_device_ids=rank.local_devices,
                cluster_detection_method="deactivate",
                coordinator_bind_address=f"[::]:{port}",
                initialization_timeout=math.ceil(start_timeout) + MISSING_LATER,
                heartbeat_timeout_seconds=math.ceil(max(SILENT_LATER, 3 * peer_timeout)),
            )
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"the processes failed to connect: {first}") from error
