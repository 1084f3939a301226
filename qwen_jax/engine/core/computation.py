"""Everything but weights, adapters and the request itself that decides what an engine answers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import jax
import numpy as np

from qwen_jax.contents import package_digest
from qwen_jax.engine.config.engine_config import EngineConfig
from qwen_jax.engine.config.resolve import ResolvedConfig
from qwen_jax.engine.runner.executable_cache import environment
from qwen_jax.parallel.plan import ParallelPlan

# Every other option counts, so that a new one cannot be forgotten. What a draft model guesses is checked by the model.
WITHOUT_INFLUENCE = frozenset(("progress", "cache_dir", "warmup", "strict_compiles", "speculation"))


def computation(options: EngineConfig, resolved: ResolvedConfig, plan: ParallelPlan) -> dict[str, str]:
    """Return, by name, the text of each thing that decides an engine's answers beside weights, adapters and request.

    They are the package's sources, the environment of its programs (versions, devices, instruction set, flags), the
    parallel plan, every option as given, and every option as resolved for the model: element types, 8-bit parts with
    their ranges, sparse attention, limits, schedules, batch invariance.
    """
    found = {"package": str(package_digest()), "environment": repr(environment()), "plan": repr(plan)}
    for group in (options, resolved):
        found |= {f"{type(group).__name__}.{field.name}": _text(getattr(group, field.name)) for field in fields(group)
                  if field.name not in WITHOUT_INFLUENCE}
    return found


def _text(value: Any) -> str:
    """Return the ``repr`` of an option's value, with all elements of the arrays in it."""
    return repr(jax.tree.map(lambda leaf: np.asarray(leaf).tolist() if isinstance(leaf, jax.Array | np.ndarray) else
                             leaf, value))
