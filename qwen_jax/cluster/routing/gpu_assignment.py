"""Which devices of a machine each of several engines has."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qwen_jax.engine.scheduling.schedule_policy import check_positive
from qwen_jax.errors import UserError


def gpus() -> list[str]:
    """NVIDIA GPUs that this process may use, by what ``CUDA_VISIBLE_DEVICES`` calls them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [one for one in visible.split(",") if one]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*")
                  if re.fullmatch(r"nvidia\d+", path.name))


def environments(replicas: int, devices: int) -> list[dict[str, str]]:
    """For each engine, the variables with which it sees its own ``devices`` GPUs and no others; none on a CPU, which
    they share. UserError when there are too few."""
    check_positive(replicas=replicas, devices=devices)
    there = gpus()
    if not there:
        return [{} for _ in range(replicas)]
    if replicas * devices > len(there):
        raise UserError(f"{replicas} replicas of {devices} devices each need {replicas * devices}, and there are "
                        f"{len(there)}: lower them")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(there[at * devices:(at + 1) * devices])} for at in range(replicas)]
