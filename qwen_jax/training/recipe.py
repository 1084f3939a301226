"""Training recipes read from TOML files. An unknown key, or a value of another type, is an error."""
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from qwen_jax.errors import UserError
from qwen_jax.structs import convert


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base class of the tables of a recipe, whose fields are the keys that the table may have."""


Kind = TypeVar("Kind", bound=Table)
Positive = Annotated[int, msgspec.Meta(ge=1)]
Names = Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
Numbers = Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]


class Optimizer(Table):
    """Settings of AdamW with a linear warm-up and a cosine decay to zero."""
    learning_rate: float        # peak
    warmup_steps: int = 0
    weight_decay: float = 0.0   # applies to matrices only
    clip_norm: float = 1.0      # largest norm of the whole gradient
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    adam_eps: float = 1e-8


class Lora(Table):
    """Settings of a LoRA adapter that is trained instead of the model. Target names are Hugging Face's."""
    rank: int = 16
    alpha: float = 32.0
    targets: Names = ("q_proj", "k_proj", "v_proj", "o_proj")


class Distill(Table):
    """Settings for learning from a teacher's probabilities as well as from the data (https://arxiv.org/abs/1503.02531).

    The loss is ``(1 - kl_weight) · CE + kl_weight · temperature² · KL(teacher || student)``. The divergence compares
    both distributions at the temperature.
    """
    teacher: str | None = None     # a model as load_model takes it; default: the recipe's model with all its layers
    layers: Numbers | None = None  # layers of the recipe's model that make the student
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    kl_weight: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5

    def __post_init__(self) -> None:
        if self.teacher is None and self.layers is None:
            raise UserError("distillation needs a teacher, or the layers of the model that make the student")


class Devices(Table):
    """Mesh of a training run: rows are split over `data` groups of `tensor` devices, each group with all parameters."""
    data: Positive = 1
    tensor: Positive = 1


class Recipe(Table):
    """Settings of ``qwen-jax train``: fine-tuning or distillation of a checkpoint on conversations or texts."""
    model: str                      # a model as load_model takes it
    data: Names                     # JSONL files
    output: str                     # folder of checkpoints, metrics, curves, and the result in `result`
    steps: Positive
    sequence_length: Positive       # tokens per row
    batch_size: Positive            # rows per step
    optimizer: Optimizer
    lora: Lora | None = None
    distill: Distill | None = None
    devices: Devices | None = None  # default: one device
    accumulate: Positive = 1        # number of groups of rows that a step works on one after another
    seed: int = 0                   # decides the order of examples and a new adapter's initial values
    on_bad: Literal["refuse", "skip"] = "refuse"  # for lines that are no examples and conversations that are too long
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations; weights and gradients are float32
    fp8: bool = False               # 8-bit products in all layers but the first and the last; with [lora] these layers
                                    # are stored in 8 bits too
    recompute: bool = False         # compute layers again in the backward pass instead of keeping their activations
    checkpoint_every: Positive = 100  # steps
    keep: Positive = 2              # number of checkpoints
    max_skipped: Positive = 10      # steps in a row with non-finite gradients that end the run

    def __post_init__(self) -> None:
        if self.optimizer.warmup_steps >= self.steps:
            raise UserError(f"warmup_steps must be less than steps, not {self.optimizer.warmup_steps} of {self.steps}")
        if self.batch_size % self.accumulate:
            raise UserError(f"batch_size must be a multiple of accumulate={self.accumulate}, not {self.batch_size}")
        if self.devices and self.batch_size // self.accumulate % self.devices.data:
            raise UserError("batch_size / accumulate must be a multiple of [devices] data="
                            f"{self.devices.data}, not {self.batch_size // self.accumulate}")
        if self.lora and self.distill:
            raise UserError("a student is trained whole: a recipe has [lora] or [distill], not both")
        if self.fp8 and self.lora and self.devices:
            raise UserError("fp8 = true with [lora] runs on one device: leave out [devices]")


def load_recipe(path: str | Path, kind: type[Kind] = Recipe) -> Kind:
    """Read a recipe from a TOML file.

    Raises UserError, which names the file and the key, for a file that is missing or not TOML, and for an unknown,
    missing or unsuitable key.
    """
    try:
        table = msgspec.toml.decode(Path(path).read_bytes())
    except OSError:
        raise UserError(f"{path}: no such recipe") from None
    except msgspec.DecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    try:
        return convert(table, kind, "the recipe")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
