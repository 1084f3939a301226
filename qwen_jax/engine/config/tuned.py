"""Results of `qwen-jax tune` for a device and a model's shape, as a file in the user's cache."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from qwen_kernels.cache import cache_root
from qwen_kernels.private_folder import make_private

from qwen_jax.atomic import replace_file
from qwen_jax.config import UNTRACED, ModelConfig
from qwen_jax.engine.scheduling.buckets import Grid, Limits, bucket_table, default_limits
from qwen_jax.engine.scheduling.schedule_policy import DEFAULT_POLICY, SchedulePolicy
from qwen_jax.errors import UserError

logger = logging.getLogger(__name__)

FORMAT = 1
REFUSE = "QWEN_JAX_TUNED"  # environment variable: with "0" engines look for no file
_HARMLESS = (*UNTRACED, "rope")  # fields of a model's configuration that change no time


@dataclass(frozen=True)
class Tuned:
    """Schedule thresholds and bucket shapes for one kind of device and one shape of model.

    Sparse attention is an approximation, so its threshold is never below the default: tuning must not approximate more
    prompts. Full attention and recompute compute the same.

    Attributes:
      measured: content of the file, with measured or predicted times beside each choice.
      path: the file it was read from.

    Raises UserError for shapes that no engine could run.
    """

    policy: SchedulePolicy
    grid: Grid
    measured: dict[str, Any] = field(default_factory=dict, compare=False)
    path: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        default = DEFAULT_POLICY.sparse_above_tokens
        if self.policy.sparse_above_tokens < default:
            raise UserError(f"sparse_above_tokens={self.policy.sparse_above_tokens} is below {default}: more prompts "
                            "would be approximated than without tuning")
        for name, values in (("decode_rows", self.grid.decode_rows),
                             ("sparse_decode_rows", self.grid.sparse_decode_rows)):
            if list(values) != sorted(set(values)) or not values or values[0] < 1:
                raise UserError(f"{name} must be positive and ascending, not {values}")
        if min(self.grid.prefill_chunk_pages, self.grid.decode_chunk_pages) < 0:
            raise UserError("a number of pages must not be negative")
        bucket_table(self.limits(64, self.policy.sparse_above_tokens + 1), self.policy)

    def limits(self, max_batch_size: int, max_seq_len: int) -> Limits:
        """Return the limits of an engine of these sizes, with the tuned bucket shapes."""
        return default_limits(max_batch_size, max_seq_len, policy=self.policy, grid=self.grid)

    def choices(self) -> dict[str, Any]:
        """Return every tuned threshold and shape by its name."""
        return asdict(self.policy) | asdict(self.grid)

    @classmethod
    def from_choices(cls, choices: dict[str, Any], measured: dict[str, Any] | None = None,
                     path: Path | None = None) -> Tuned:
        """Make a `Tuned` from a result of `choices`. UserError for missing or unknown names, or wrong types."""
        known = {choice.name for choice in (*fields(SchedulePolicy), *fields(Grid))}
        if wrong := known ^ set(choices):
            raise UserError(f"its choices lack or do not know {', '.join(sorted(wrong))}")
        values = {name: _frozen(name, value) for name, value in choices.items()}
        policy, grid = (kind(**{choice.name: values[choice.name] for choice in fields(kind)})
                        for kind in (SchedulePolicy, Grid))
        return cls(policy, grid, measured or {}, path)


def subject(config: ModelConfig, dtype: Any, fp8_enabled: bool) -> dict[str, Any]:
    """Return what tuning results depend on: device, model shape, element type and whether weights are 8-bit."""
    shape = {name: value for name, value in asdict(config).items() if name not in _HARMLESS}
    return {"device": device_name(), "model": shape, "dtype": str(jnp.dtype(dtype)), "fp8": bool(fp8_enabled)}


def device_name() -> str:
    """Return the name of the first device; for a CPU its model and the number of cores this process may use."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def path_of(about: dict[str, Any]) -> Path:
    """Return the path of the tuning results for a `subject`: in the folder ``tuned`` of the user's cache."""
    digest = sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    return cache_root() / "tuned" / f"{name}-{digest}.json"


def find(config: ModelConfig, dtype: Any, fp8_enabled: bool = False) -> Tuned | None:
    """Return the stored tuning results for this device and model; None without any, or with ``QWEN_JAX_TUNED=0``.

    A file that cannot be used is skipped with a warning.
    """
    if os.environ.get(REFUSE) == "0":
        return None
    about = subject(config, dtype, fp8_enabled)
    path = path_of(about)
    try:
        return read(path, about)
    except FileNotFoundError:
        return None
    except UserError as error:
        logger.warning("%s; the engine takes its defaults", error)
        return None


def read(path: Path, about: dict[str, Any]) -> Tuned:
    """Read tuning results. FileNotFoundError without the file, UserError if it is unusable or of another `subject`."""
    again = "run `qwen-jax tune` again or remove it"
    try:
        stored = json.loads(path.read_text())
        version, made_with = stored["format"], stored["jax"]
        if version != FORMAT:
            raise UserError(f"{path} has format {version}, not {FORMAT}: {again}")
        if made_with != jax_version():
            raise UserError(f"{path} was measured with jax {made_with}, and this is {jax_version()}: {again}")
        if stored["about"] != about:
            raise UserError(f"{path} is about another device or model: {again}")
        choices = {name: choice["value"] for name, choice in stored["choices"].items()}
        return Tuned.from_choices(choices, stored, path)
    except FileNotFoundError:
        raise
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}; {again}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}): {again}") from None


def write(path: Path, about: dict[str, Any], tuned: Tuned, beside: dict[str, dict[str, Any]], **more: Any) -> Tuned:
    """Write tuning results to a file, and return them as `read` would.

    beside: measurements to keep with each choice, by its name. more: other fields of the file, for people to read.
    """
    stored = {"format": FORMAT, "jax": jax_version(), "about": about,
              "choices": {name: {"value": value} | beside.get(name, {}) for name, value in tuned.choices().items()},
              **more}
    write_json(path, stored)
    return replace(tuned, measured=json.loads(json.dumps(stored)), path=path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. Raises UserError when it cannot be written."""
    try:
        make_private(path.parent)
        replace_file(path, (json.dumps(value, indent=1) + "\n").encode(), private=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; set QWEN_JAX_CACHE to a folder of yours") from None


def jax_version() -> str:
    """Return the major and minor version of JAX, which decide what programs cost."""
    return ".".join(jax.__version__.split(".")[:2])


def _frozen(name: str, value: Any) -> Any:
    """Return a tuned value, an integer or a list, with lists as tuples. Raises UserError for other values."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(name, item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} must hold integers, not {value!r}")
    return value

