"""The file in a checkpoint's folder that says which of its parameters and KV caches may be 8-bit."""
import json
from pathlib import Path

import numpy as np
from qwen_kernels.attention.eight_bit import LARGEST

from qwen_jax.checkpoint.shipped_calibration import calibration_folder
from qwen_jax.checkpoint.source import EIGHT_BIT, Source
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.quantization import Calibrated, Precision, Ranges


def write_calibrated(folder: str | Path, calibrated: Calibrated, measured: dict[str, float]) -> Path:
    """Write the file that says which parameters and KV caches may be 8-bit; return its path.

    It also holds the ranges of keys and values, and the figures measured.
    """
    path, precision = Path(folder) / EIGHT_BIT, calibrated.precision
    ranges = [{name: [[float(f"{x:.4g}") for x in head] for head in np.asarray(values)]
               for name, values in layer._asdict().items()} for layer in calibrated.ranges]
    layers = [{"weights": weights, "kv_cache": kind, **layer_ranges} for weights, kind, layer_ranges
              in zip(precision.weights, precision.kv_cache, ranges, strict=True)]
    try:
        path.write_text(json.dumps({"tables": precision.tables, "measured": measured, "layers": layers}) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another folder with --output") from None
    return path


def read_calibrated(where: str | Path | Source, config: ModelConfig) -> Calibrated | None:
    """Read which parameters and KV caches of a model may be 8-bit; None when there is no such file.

    where: a folder, or a model's source, for which files of this package are looked for too.

    Raises UserError for a file that is damaged or of another model.
    """
    path = calibration_folder(where, EIGHT_BIT) / EIGHT_BIT
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text())
        layers = facts["layers"]
        precision = Precision(tuple(bool(layer["weights"]) for layer in layers), bool(facts["tables"]),
                              tuple(layer["kv_cache"] for layer in layers))
        ranges = tuple(Ranges(*(np.asarray(layer[name], np.float32) for name in Ranges._fields)) for layer in layers)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not what `qwen-jax calibrate --fp8` writes ({error}): run it again") from None
    wanted = (config.num_kv_heads, config.head_dim)
    if len(layers) != config.num_layers or any(x.shape != wanted for layer in ranges for x in layer):
        raise UserError(f"{path} is of another model: run `qwen-jax calibrate --fp8` again")
    if not all(np.all(np.isfinite(x) & (x >= 0)) for layer in ranges for x in layer) or \
            not set(precision.kv_cache) <= {None, *LARGEST}:
        raise UserError(f"{path} is damaged: run `qwen-jax calibrate --fp8` again")
    return Calibrated(precision, ranges)
