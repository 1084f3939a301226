"""Training recipes: TOML files in which every key is known."""
import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qwen_jax.errors import UserError

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Optimizer:
    """AdamW with a linear warm-up and a cosine down to zero."""
    learning_rate: float        # peak
    warmup_steps: int = 0
    weight_decay: float = 0.0   # of matrices
    clip_norm: float = 1.0      # of the whole gradient
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    adam_eps: float = 1e-8


@dataclass(frozen=True)
class Lora:
    """Train an adapter instead of the model. Target names are Hugging Face's."""
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning of a checkpoint on conversations or texts: ``qwen-jax train``."""
    model: str                      # anything that load_model takes
    data: tuple[str, ...]           # JSONL files
    output: str                     # folder: checkpoints, metrics, curves, and the result in `result`
    steps: int
    sequence_length: int            # tokens per row
    batch_size: int                 # rows per step
    optimizer: Optimizer
    lora: Lora | None = None
    accumulate: int = 1             # groups of rows worked on one after another
    seed: int = 0                   # of the order of examples, and of a new adapter
    on_bad: str = "refuse"          # or "skip": lines that are no examples, conversations that are too long
    compute_dtype: str = "bfloat16"  # of activations; trained values and gradients are float32
    recompute: bool = False         # layers again in the backward pass, instead of keeping their activations
    checkpoint_every: int = 100     # steps
    keep: int = 2                   # checkpoints
    max_skipped: int = 10           # steps in a row with non-finite gradients that end the run

    def __post_init__(self) -> None:
        for name in ("steps", "sequence_length", "batch_size", "accumulate", "checkpoint_every", "keep", "max_skipped"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, is {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise UserError(f"batch_size={self.batch_size} rows do not split into accumulate={self.accumulate} groups")
        if self.compute_dtype not in ("bfloat16", "float32"):
            raise UserError(f"compute_dtype must be 'bfloat16' or 'float32', is {self.compute_dtype!r}")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a new model of the Qwen2.5 architecture, counted in elements; the head is tied to the embedding."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float


@dataclass(frozen=True)
class BundledRecipe:
    """The bundled fraud-screening model, from nothing: ``scripts/train_bundled.py``."""
    seed: int
    vocab_size: int            # at most
    sequence_length: int       # tokens per row
    batch_size: int            # rows
    turns: int                 # requests about one account; what exceeds the row is cut
    explain: float             # fraction of the later ones that ask for an explanation instead of a verdict
    steps: int
    lm_weight: float           # weight of a token outside the answers; answers weigh 1
    evaluate_every: int        # steps
    optimizer: Optimizer
    model: ModelShape


def load_recipe(path: str | Path, kind: type[Kind] = Recipe) -> Kind:
    """Reads a recipe. An unknown, missing or mistyped key, or a file that is no TOML, is a UserError."""
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError:
        raise UserError(f"{path}: no such recipe") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    try:
        return _build(kind, table, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _build(kind: type, table: dict, where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    unknown, missing = sorted(table.keys() - fields), sorted(required - table.keys())
    if unknown:
        raise UserError(f"{where}unknown key {', '.join(unknown)}; known keys: {', '.join(fields)}")
    if missing:
        raise UserError(f"{where}missing key {', '.join(missing)}")
    types_of = typing.get_type_hints(kind)
    return kind(**{name: _value(types_of[name], value, name, where) for name, value in table.items()})


def _value(kind: Any, value: Any, name: str, where: str) -> Any:
    if typing.get_origin(kind) is types.UnionType:
        kind = next(choice for choice in typing.get_args(kind) if choice is not type(None))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where}{name} should be a table, [{name}]")
        return _build(kind, value, f"[{name}]: ")
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise UserError(f"{where}{name} should be a list of texts, is {value!r}")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise UserError(f"{where}{name} should be {kind.__name__}, is {value!r}")
    return value
