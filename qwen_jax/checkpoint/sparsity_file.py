"""The file in a checkpoint's folder that says how sparse the attention of each of its layers may be."""
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from qwen_kernels.sparse_attention import Sparsity

from qwen_jax.checkpoint.shipped_calibration import calibration_folder
from qwen_jax.checkpoint.source import SPARSITY, Source
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError


def write_sparsity(folder: str | Path, layers: Sequence[Sparsity], measured: dict[str, float]) -> Path:
    """Write the attention sparsity of every layer, and the figures measured with it, to a file; return its path."""
    path = Path(folder) / SPARSITY
    try:
        facts = {"layers": [asdict(layer) for layer in layers], "measured": measured}
        path.write_text(json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another folder with --output") from None
    return path


def read_sparsity(where: str | Path | Source, config: ModelConfig) -> tuple[Sparsity, ...] | None:
    """Read the attention sparsity of every layer of a model; None when there is no such file.

    where: a folder, or a model's source, for which files of this package are looked for too.

    Raises UserError for a file that is damaged or of another model.
    """
    path = calibration_folder(where, SPARSITY) / SPARSITY
    if not path.is_file():
        return None
    try:
        layers = tuple(Sparsity(**layer | {"dense_heads": tuple(map(int, layer["dense_heads"]))})
                       for layer in json.loads(path.read_text())["layers"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not what `qwen-jax calibrate` writes ({error}): run it again") from None
    if len(layers) != config.num_layers:
        raise UserError(f"{path} is of {len(layers)} layers and the model has {config.num_layers}: "
                        "run `qwen-jax calibrate` again")
    if any(not 0 <= head < config.num_kv_heads for layer in layers for head in layer.dense_heads):
        raise UserError(f"{path} names heads that the model does not have: run `qwen-jax calibrate` again")
    return layers
