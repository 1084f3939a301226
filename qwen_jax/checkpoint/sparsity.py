"""How sparse a checkpoint's attention may be, as a file in its folder."""
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax.checkpoint.source import SPARSITY
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError


def write_sparsity(folder: str | Path, sparsity: Sparsity, dense: np.ndarray, measured: dict[str, float]) -> Path:
    """Writes ``dense`` (bool ``[L, K]``), the options for all other heads, and what was measured with them."""
    options = {name: value for name, value in asdict(sparsity).items() if name != "dense_heads"}
    facts = {**options, "dense_heads": np.argwhere(dense).tolist(), "measured": measured}
    path = Path(folder) / SPARSITY
    try:
        path.write_text(json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another folder with --output") from None
    return path


def read_sparsity(folder: str | Path, config: ModelConfig) -> tuple[Sparsity, ...] | None:
    """The sparsity of every layer, or None when the folder says nothing. UserError for a file that does not fit."""
    path = Path(folder) / SPARSITY
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text())
        facts.pop("measured", None)
        heads = [(int(layer), int(head)) for layer, head in facts.pop("dense_heads")]
        common = Sparsity(**facts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not what `qwen-jax calibrate` writes ({error}): run it again") from None
    if any(not (0 <= layer < config.num_layers and 0 <= head < config.num_kv_heads) for layer, head in heads):
        raise UserError(f"{path} names heads that the model does not have: run `qwen-jax calibrate` again")
    return tuple(replace(common, dense_heads=tuple(sorted(head for at, head in heads if at == layer)))
                 for layer in range(config.num_layers))
