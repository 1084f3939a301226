"""Parallel plans: the number of model replicas, pipeline stages and devices per stage, and the layout on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError, check_positive_integer
from qwen_jax.parallel.layout import Layout, best_layout


@dataclass(frozen=True)
class ParallelPlan:
    """Division of a model over devices: ``data`` replicas, each of pipeline stages of ``layout.tensor`` devices.

    Attributes:
      data: number of replicas of the model, each with pages and requests of its own.
      stages: number of layers of each stage, first to last. The first also has the embedding, the last the norm and the
        head.
      layout: layout of every stage's parameters on its devices.
    """

    data: int
    stages: tuple[int, ...]
    layout: Layout

    @property
    def tensor(self) -> int:
        """Number of devices of each pipeline stage, which share its layers by tensor parallelism."""
        return self.layout.tensor

    @property
    def devices(self) -> int:
        """Number of devices of all replicas and stages together."""
        return self.data * len(self.stages) * self.tensor

    @cached_property
    def first_layers(self) -> tuple[int, ...]:
        """Index in the model of each pipeline stage's first layer."""
        return tuple(sum(self.stages[:stage]) for stage in range(len(self.stages)))

    def __str__(self) -> str:
        return f"data={self.data} stage={len(self.stages)} tensor={self.tensor}"


def make_plan(config: ModelConfig, data: int = 1, stage: int = 1, tensor: int = 1, cached_tokens: int = 65_536,
              layout: Layout | None = None) -> ParallelPlan:
    """Make a plan with these numbers of replicas, stages and devices per stage, and evenly filled stages.

    layout: by default the best for ``cached_tokens`` (see `best_layout`). Raises UserError for sizes that are not
    positive integers, and for more stages than layers.
    """
    check_positive_integer("the data axis", data)
    check_positive_integer("the stage axis", stage)
    if stage > config.num_layers:
        raise UserError(f"the stage axis must be at most the number of layers, {config.num_layers}, not {stage}")
    return ParallelPlan(data, split_layers(config.num_layers, stage),
                        layout or best_layout(config, tensor, cached_tokens))


def split_layers(num_layers: int, stages: int) -> tuple[int, ...]:
    """Return the number of layers of each pipeline stage, first to last.

    If layers do not divide evenly, stages in the middle get one more: the first also looks tokens up, and the last
    computes the logits, which takes as long as a layer or more.
    """
    layers, remainder = divmod(num_layers, stages)
    order = [*range(1, stages - 1), 0, stages - 1][:stages]
    larger = set(order[:remainder])
    return tuple(layers + (stage in larger) for stage in range(stages))
