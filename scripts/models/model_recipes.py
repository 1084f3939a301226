"""Training recipes of the models that the package brings along: `bundled`, `student` and `yardstick`."""
from typing import Annotated

import msgspec

from qwen_jax.training.recipe import Distill, Numbers, Optimizer, Table


class ModelShape(Table):
    """Sizes of a new model of the Qwen2.5 architecture, counted in elements; the head is tied to the embedding."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float


class ScreeningRecipe(Table):
    """Training settings that the two card-screening models, `bundled` and `student`, have in common."""
    seed: int
    sequence_length: int       # tokens per row
    batch_size: int            # rows
    turns: int                 # requests about one account; what exceeds the row is cut
    explain: float             # fraction of the later requests that ask for an explanation instead of a verdict
    steps: int
    lm_weight: float           # weight of a token outside the answers; answers weigh 1
    evaluate_every: int        # steps
    optimizer: Optimizer
    model: ModelShape


class BundledRecipe(ScreeningRecipe):
    """Training settings of ``train_bundled.py``: the fraud-screening model, from random initial values."""
    vocab_size: int            # at most


class StudentRecipe(ScreeningRecipe):
    """Training settings of ``train_student.py``: a smaller model that learns from a teacher, with its vocabulary."""
    distill: Distill


class Stage(Table):
    """A part of a training run whose batches all have rows (training sequences) of the same length."""
    length: int  # tokens per row
    rows: int    # per step
    steps: int


class YardstickRecipe(Table):
    """Training settings of ``train_yardstick.py``: the model for long-context tests."""
    seed: int                  # decides the material and the initial values
    vocab_size: int            # at most
    reach: int                 # tokens; short rows skip positions so that distances up to it occur
    lm_weight: float           # weight of a token outside the answers; answers weigh 1
    evaluate_every: int        # steps
    evaluate_lengths: Numbers  # tokens
    stages: Annotated[tuple[Stage, ...], msgspec.Meta(min_length=1)]  # run one after another
    optimizer: Optimizer
    model: ModelShape
    start_from: str | None = None  # a model of that shape, whose tokenizer is kept; default: random initial values
    query_scale: float = 1.0   # factor of all queries after training: contexts longer than the rows dilute attention
