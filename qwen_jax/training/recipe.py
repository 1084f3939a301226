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
class Distill:
    """Learn from a teacher's probabilities as well as from the data (https://arxiv.org/abs/1503.02531).

    The loss is ``(1 - kl_weight) · CE + kl_weight · temperature² · KL(teacher || student)``, the divergence being that
    of both distributions at the temperature.
    """
    teacher: str | None = None            # anything that load_model takes; default: the recipe's model as it is
    layers: tuple[int, ...] | None = None  # the student is made of these layers of the recipe's model
    temperature: float = 2.0
    kl_weight: float = 0.5

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 < self.kl_weight <= 1:
            raise UserError("temperature must be positive and kl_weight in (0, 1]")
        if self.teacher is None and self.layers is None:
            raise UserError("distillation needs a teacher, or the layers of the model that make the student")


@dataclass(frozen=True)
class Devices:
    """A mesh: rows split over `data` groups of `tensor` devices, each group holding one copy of the parameters."""
    data: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if self.data < 1 or self.tensor < 1:
            raise UserError(f"data={self.data} and tensor={self.tensor} must be at least 1")


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
    distill: Distill | None = None
    devices: Devices | None = None  # default: one
    accumulate: int = 1             # groups of rows worked on one after another
    seed: int = 0                   # of the order of examples, and of a new adapter
    on_bad: str = "refuse"          # or "skip": lines that are no examples, conversations that are too long
    compute_dtype: str = "bfloat16"  # of activations; trained values and gradients are float32
    fp8: bool = False               # 8-bit products in all layers but the first and the last; with [lora] these layers
                                    # are stored in 8 bits too
    recompute: bool = False         # layers again in the backward pass, instead of keeping their activations
    checkpoint_every: int = 100     # steps
    keep: int = 2                   # checkpoints
    max_skipped: int = 10           # steps in a row with non-finite gradients that end the run

    def __post_init__(self) -> None:
        for name in ("steps", "sequence_length", "batch_size", "accumulate", "checkpoint_every", "keep", "max_skipped"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, is {getattr(self, name)}")
        if self.optimizer.warmup_steps >= self.steps:
            raise UserError(f"warmup_steps={self.optimizer.warmup_steps} leave nothing of steps={self.steps}")
        if self.batch_size % self.accumulate:
            raise UserError(f"batch_size={self.batch_size} rows do not split into accumulate={self.accumulate} groups")
        if self.devices and self.batch_size // self.accumulate % self.devices.data:
            raise UserError(f"{self.batch_size // self.accumulate} rows at a time do not split over "
                            f"data={self.devices.data}")
        if self.lora and self.distill:
            raise UserError("a student is trained whole: a recipe has [lora] or [distill], not both")
        if self.fp8 and self.lora and self.devices:
            raise UserError("fp8 = true with [lora] runs on one device: leave out [devices]")
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


@dataclass(frozen=True)
class Stage:
    """A part of a training run with rows of one length."""
    length: int  # tokens per row
    rows: int    # per step
    steps: int


@dataclass(frozen=True)
class YardstickRecipe:
    """The long-context yardstick model: ``scripts/train_yardstick.py``."""
    seed: int                  # of the material, and of initial values
    vocab_size: int            # at most
    reach: int                 # tokens: short rows skip positions so that distances up to it occur
    lm_weight: float           # weight of a token outside the answers; answers weigh 1
    evaluate_every: int        # steps
    evaluate_lengths: tuple[int, ...]  # tokens
    stages: tuple[Stage, ...]  # one after another
    optimizer: Optimizer
    model: ModelShape
    start_from: str | None = None  # a model of that shape, whose tokenizer is kept; default: from nothing
    query_scale: float = 1.0   # of all queries once trained: contexts longer than the rows dilute attention


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
        if not isinstance(value, list) or not value:
            raise UserError(f"{where}{name} should be a list with at least one item, is {value!r}")
        item_kind = typing.get_args(kind)[0]
        return tuple(_value(item_kind, item, f"{name}[{index}]", where) for index, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise UserError(f"{where}{name} should be {kind.__name__}, is {value!r}")
    return value
