"""Training states on disk: complete or absent, restored bit for bit on any mesh, the oldest ones removed.

Orbax's checkpoint manager is not used: it leaves a partial folder on a full disk, and does not flush a checkpoint
before it removes older ones.
"""
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen_jax.atomic import new_folder
from qwen_jax.checkpoint import orbax_store
from qwen_jax.checkpoint.source import read_json
from qwen_jax.errors import UserError

ARRAYS, FACTS = "state", "training.json"


def save(folder: Path, step: int, state: Any, run: dict, keep: int) -> Path:
    """Write `state`, any pytree of arrays, to ``step-{step}`` in `folder`; remove all but the last `keep` checkpoints.

    run: settings that a continued run must share with this one, as JSON values. Raises UserError when the disk is
    full; earlier checkpoints are then still there.
    """
    arrays = {name: np.asarray(value) for name, value in _named(state).items()}
    path = folder / f"step-{step:08d}"
    with new_folder(path, sum(value.nbytes for value in arrays.values())) as temporary:
        sizes = {name: value.nbytes for name, value in arrays.items()}
        orbax_store.write(temporary / ARRAYS, ({name: arrays[name] for name in group}
                                               for group in orbax_store.groups(sizes)))
        (temporary / FACTS).write_text(json.dumps({"step": step, "run": run}) + "\n")
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def restore(folder: Path, like: Any, run: dict) -> tuple[int, Any] | None:
    """Read the last (step, state) saved in `folder`; arrays get the dtype and sharding of those in `like`.

    Returns None when there is no checkpoint. Raises UserError when it was saved with other `run` settings or has other
    arrays.
    """
    folders = _folders(folder)
    if not folders:
        return None
    facts, run = read_json(folders[-1] / FACTS), json.loads(json.dumps(run))
    if facts["run"] != run:
        differing = sorted(key for key in facts["run"].keys() | run.keys() if facts["run"].get(key) != run.get(key))
        raise UserError(f"{folder} holds a run with another {', '.join(differing)}: name another folder, or remove it")
    leaves, tree = jax.tree.flatten(like)
    wanted = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
              for name, leaf in zip(_named(like), leaves, strict=True)}
    arrays = orbax_store.read(folders[-1] / ARRAYS, wanted)
    return facts["step"], jax.tree.unflatten(tree, [arrays[name] for name in wanted])


def _named(state: Any) -> dict[str, Any]:
    """Return the leaves of a state by flat names that can also name files."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def _folders(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a run's folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / FACTS).is_file())
