"""How many devices do what: a plan is data, decided before anything is placed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.parallel.layout import Layout, best_layout


@dataclass(frozen=True)
class ParallelPlan:
    """``data`` replicas, each a row of ``stages``, each of ``layout.tensor`` devices.

    Attributes:
      data: replicas of the model, each with pages and requests of its own.
      stages: layers of each stage, first to last. The first also has the embedding, the last the norm and the head.
      layout: of every stage's parameters.
    """

    data: int
    stages: tuple[int, ...]
    layout: Layout

    @property
    def tensor(self) -> int:
        return self.layout.tensor

    @property
    def devices(self) -> int:
        return self.data * len(self.stages) * self.tensor

    @cached_property
    def first_layers(self) -> tuple[int, ...]:
        """The first layer of each stage."""
        return tuple(sum(self.stages[:stage]) for stage in range(len(self.stages)))

    def __str__(self) -> str:
        return f"data={self.data} stage={len(self.stages)} tensor={self.tensor}"


def make_plan(config: ModelConfig, data: int = 1, stage: int = 1, tensor: int = 1, cached_tokens: int = 65_536,
              layout: Layout | None = None) -> ParallelPlan:
    """A plan with evenly filled stages; without a layout the best for ``cached_tokens`` (see `best_layout`).

    UserError for sizes that are no positive integers, and for more stages than layers.
    """
    for name, size in (("data", data), ("stage", stage)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UserError(f"the {name} axis must be a positive integer, not {size!r}")
    if stage > config.num_layers:
        raise UserError(f"{stage} stages for {config.num_layers} layers: a stage needs a layer at least")
    return ParallelPlan(data, split_layers(config.num_layers, stage),
                        layout or best_layout(config, tensor, cached_tokens))


def split_layers(num_layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage; where they do not divide, the stages in the middle have one more than others: the first
    also looks tokens up, and the last computes the logits, which takes as long as a layer or more."""
    least, more = divmod(num_layers, stages)
    order = [*range(1, stages - 1), 0, stages - 1][:stages]
    larger = set(order[:more])
    return tuple(least + (stage in larger) for stage in range(stages))
