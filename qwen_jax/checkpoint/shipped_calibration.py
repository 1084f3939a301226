"""Calibrations of released models that come with this package, found by a model's shape and by some of its weights.

A folder below `SHIPPED_CALIBRATIONS` has a calibration's files and `MODEL`: the released model's name, its shape, and a
`fingerprint`. Quantisation and LoRA leave a fingerprint as it is; training of all weights changes it a little.
"""
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen_jax.checkpoint.source import Source, shape_of
from qwen_jax.checkpoint.tensors import open_tensors

SHIPPED_CALIBRATIONS = Path(__file__).with_name("calibrations")
MODEL = "model.json"
SAME = 0.004  # relative distance of fingerprints of the same weights, rounded to bfloat16
TUNED = 0.05  # and of weights that were trained further
VALUES = 64   # of each vector in a fingerprint
logger = logging.getLogger(__name__)


def calibration_folder(where: str | Path | Source, name: str) -> Path:
    """Return the folder with a model's calibration file ``name``, if there is one: its own, or one of this package.

    where: a folder, which is returned as it is, or a model's source.
    """
    if not isinstance(where, Source):
        return Path(where)
    if (where.path / name).is_file():
        return where.path
    return _shipped(where) or where.path


def _shipped(source: Source) -> Path | None:
    """Return the folder of the calibration of the released model that these weights are or come from."""
    shape = list(shape_of(source.config))
    for folder in sorted(path.parent for path in SHIPPED_CALIBRATIONS.glob(f"*/{MODEL}")):
        model = json.loads((folder / MODEL).read_text())
        if model["shape"] != shape:
            continue
        distance = max(float(np.linalg.norm(np.subtract(found, want)) / np.linalg.norm(want))
                       for found, want in zip(fingerprint(source).values(), model["fingerprint"].values(), strict=True))
        if distance <= SAME:
            logger.info("%s has the calibration of %s", source.path, model["name"])
        elif distance <= TUNED:
            logger.warning("%s has the calibration of %s, whose weights it resembles as if fine-tuned: `qwen-jax "
                           "calibrate` measures its own", source.path, model["name"])
        else:
            continue
        return folder
    return None


def fingerprint(source: Source) -> dict[str, list[float]]:
    """Return values of the final norm and of the first layer's key biases, which tell one model from another."""
    config = source.config
    if source.kind == "orbax":
        from qwen_jax.checkpoint import orbax_store  # imports Orbax, which takes seconds

        shapes = {"norm.scale": (config.hidden_size,),
                  "layers.0.attention.bqkv": (config.num_kv_heads, config.group_size + 2, config.head_dim)}
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        read = orbax_store.read(source.params, {path: jax.ShapeDtypeStruct(shape, np.float32, sharding=device)
                                                for path, shape in shapes.items()})
        norm, bias = read["norm.scale"], read["layers.0.attention.bqkv"][:, -2]
    else:
        tensors = open_tensors(source)
        norm, bias = tensors.read("model.norm.weight"), tensors.read("model.layers.0.self_attn.k_proj.bias")
    return {name: [float(f"{value:.4g}") for value in np.asarray(values, np.float32).reshape(-1)[:VALUES]]
            for name, values in (("norm", norm), ("key_bias", bias))}


def write_model(folder: Path, name: str, source: Source) -> None:
    """Write `MODEL` into a folder with calibration files, which makes them those of a released model."""
    facts: dict[str, Any] = {"name": name, "shape": shape_of(source.config), "fingerprint": fingerprint(source)}
    (folder / MODEL).write_text(json.dumps(facts) + "\n")
