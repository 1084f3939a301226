"""How the processes of one engine find each other."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax

from qwen_jax.engine.multihost.channel import HEARTBEAT_SECONDS
from qwen_jax.errors import UserError


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several; call it before anything else of JAX, in every one of them.

    Args:
      coordinator: "host:port", where process 0 listens; the port must be free there.
      processes: how many there are; process: which of them this is, from 0.

    Without arguments the environment says: ``MASTER_ADDR``, ``MASTER_PORT``, ``WORLD_SIZE`` and ``RANK`` (torchrun, Ray
    Train, Kubeflow), SLURM, Open MPI, or Kubernetes (an indexed Job, with ``jax[k8s]``). UserError when nothing does.
    """
    given = (coordinator, processes, process)
    if any(one is None for one in given) and any(one is not None for one in given):
        raise UserError("give coordinator, processes and process together, or none of them")
    if coordinator is None:
        coordinator, processes, process = from_environment(os.environ)
    try:
        jax.distributed.initialize(coordinator, processes, process, local_device_ids=devices_of_task(os.environ),
                                   heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"this process could not join the others: {error}. Call join() before anything else of JAX, "
                        "with coordinator='host:port', processes and process, or from SLURM, Open MPI, Kubernetes or "
                        "torchrun") from error



def from_environment(environment: Mapping[str, str]) -> tuple[str | None, int | None, int | None]:
    """Coordinator, processes and process as torchrun and those like it set them; None where JAX has to look itself."""
    names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
    if not all(environment.get(name) for name in names):
        return None, None, None
    host, port, processes, process = (environment[name] for name in names)
    return f"{host}:{port}", int(processes), int(process)



def devices_of_task(environment: Mapping[str, str]) -> list[int] | None:
    """All of a node's GPUs where SLURM starts one task per node, for which JAX would take the first alone."""
    tasks, gpus = environment.get("SLURM_STEP_TASKS_PER_NODE", ""), environment.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if tasks.split("(")[0] == "1" and gpus.isdigit() else None
