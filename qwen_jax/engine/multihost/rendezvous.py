"""Start of JAX in several processes that make one engine together."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax

from qwen_jax.engine.multihost.channel import HEARTBEAT_SECONDS
from qwen_jax.errors import UserError
from qwen_jax.xla_flags import set_safe_flags


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Make this process one of the processes that run one engine together.

    Every process has to call it, before anything else of JAX.

    Args:
      coordinator: "host:port" at which process 0 listens; the port must be free there.
      processes: number of processes.
      process: index of this process, from 0.

    Without arguments they are read from the environment: ``MASTER_ADDR``, ``MASTER_PORT``, ``WORLD_SIZE`` and ``RANK``
    (torchrun, Ray Train, Kubeflow), SLURM, Open MPI, or Kubernetes (an indexed Job, with ``jax[k8s]``). UserError when
    none of these is there, or the processes cannot be joined.
    """
    given = [argument is not None for argument in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise UserError("give coordinator, processes and process together, or none of them")
    if coordinator is None:
        coordinator, processes, process = from_environment(os.environ)
    set_safe_flags()
    try:
        jax.distributed.initialize(coordinator, processes, process, local_device_ids=devices_of_task(os.environ),
                                   heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"this process could not join the others: {error}. Call join() before anything else of JAX, "
                        "with coordinator='host:port', processes and process, or from SLURM, Open MPI, Kubernetes or "
                        "torchrun") from error


def from_environment(environment: Mapping[str, str]) -> tuple[str | None, int | None, int | None]:
    """Return the arguments of `join` from torchrun's environment variables, or three Nones without these.

    JAX finds them itself when they are None.
    """
    names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
    if not all(environment.get(name) for name in names):
        return None, None, None
    host, port, processes, process = (environment[name] for name in names)
    return f"{host}:{port}", int(processes), int(process)


def devices_of_task(environment: Mapping[str, str]) -> list[int] | None:
    """Return the indices of all GPUs of this node where SLURM starts one task per node, else None.

    JAX would give such a task the first GPU alone.
    """
    tasks, gpus = environment.get("SLURM_STEP_TASKS_PER_NODE", ""), environment.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if tasks.split("(")[0] == "1" and gpus.isdigit() else None
