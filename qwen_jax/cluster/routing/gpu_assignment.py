"""Assignment of a machine's GPUs to several engines, by environment variables."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qwen_jax.engine.scheduling.schedule_policy import check_positive
from qwen_jax.errors import UserError


def visible_gpus() -> list[str]:
    """Return the NVIDIA GPUs that this process may use, each as ``CUDA_VISIBLE_DEVICES`` names it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*")
                  if re.fullmatch(r"nvidia\d+", path.name))


def environments(replicas: int, devices: int) -> list[dict[str, str]]:
    """Return environment variables for each replica, with which it sees its own ``devices`` GPUs and no others.

    On a machine without GPUs the dictionaries are empty: the replicas share its cores.

    Raises:
      UserError: the machine has too few GPUs.
    """
    check_positive(replicas=replicas, devices=devices)
    gpus = visible_gpus()
    if not gpus:
        return [{} for _ in range(replicas)]
    if replicas * devices > len(gpus):
        raise UserError(f"replicas x tp_size must be at most the number of visible GPUs, {len(gpus)}, not "
                        f"{replicas} x {devices}: lower --replicas or --tp-size")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[index * devices:(index + 1) * devices])}
            for index in range(replicas)]
