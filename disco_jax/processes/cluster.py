"""How the processes of a run find each other: from flags, or from the launcher."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from disco_jax.errors import UserError

WATCHERS_FIRST = 30  # extra seconds before JAX aborts, so that the watchers can name who is missing


@dataclass(frozen=True)
class Launch:
    """Arguments of `jax.distributed.initialize`; None leaves detection to JAX.

    `count` and `index` are None only on TPUs, where the processes learn them from JAX.
    """

    source: str  # where this was found, for messages
    name: str  # shared by all processes of this start, and by no other start
    coordinator: str | None = None  # HOST:PORT of process 0
    count: int | None = None
    index: int | None = None
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


def start(launch: Launch, timeout: float = 300.0) -> None:
    """Connects this process to the others. Must be called before JAX is first used.

    Args:
      launch: How this process was started.
      timeout: Seconds to wait for all processes.

    Raises:
      UserError: if the processes cannot connect.
    """
    import jax

    options: dict[str, Any] = {"initialization_timeout": math.ceil(timeout) + WATCHERS_FIRST}
    if launch.source in ("slurm", "ompi"):
        options["cluster_detection_method"] = launch.source
    if launch.local_devices is not None:
        options["local_device_ids"] = list(launch.local_devices)
    if launch.source in ("flags", "environment"):
        options["cluster_detection_method"] = "deactivate"
    try:
        with warnings.catch_warnings():  # about the kubernetes client, which is not needed
            warnings.simplefilter("ignore")
            jax.distributed.initialize(launch.coordinator, launch.count, launch.index, **options)
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"the processes failed to connect ({launch.source}): {first}") from error
