"""A training recipe: one TOML file, every key known."""
import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path

from qwen_jax.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the Qwen2.5 architecture to train, counted in elements; the head is tied to the embedding."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float


@dataclass(frozen=True)
class Recipe:
    seed: int
    vocab_size: int
    sequence_length: int       # tokens per row
    batch_size: int            # rows
    turns: int                 # transactions per conversation; what exceeds the row is cut
    explain: float             # fraction of them, after the first, to be explained instead of judged
    steps: int
    profile_steps: int         # of them, the first ones: profiles only, in twice as many rows of half the length
    warmup_steps: int
    learning_rate: float       # peak, after a linear warm-up; then a cosine down to zero
    weight_decay: float
    clip_norm: float
    adam_b2: float
    lm_weight: float           # weight of a token outside the answers; answers weigh 1
    evaluate_every: int        # steps
    model: ModelShape


def _build(kind, table: dict, where: str):
    known = {field.name: field for field in dataclasses.fields(kind)}
    unknown, missing = sorted(table.keys() - known), sorted(known.keys() - table.keys())
    if unknown:
        raise UserError(f"{where}: unknown key {', '.join(unknown)}; known keys: {', '.join(known)}")
    if missing:
        raise UserError(f"{where}: missing key {', '.join(missing)}")
    values = {}
    for name, field in known.items():
        value = table[name]
        if field.type is ModelShape:
            value = _build(ModelShape, value, f"{where} [model]") if isinstance(value, dict) else value
        elif field.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, field.type) or isinstance(value, bool):
            raise UserError(f"{where}: {name} should be {field.type.__name__}, is {value!r}")
        values[name] = value
    return kind(**values)


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe. An unknown, missing or mistyped key, or a file that is no TOML, is a UserError."""
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    return _build(Recipe, table, str(path))
