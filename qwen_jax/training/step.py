"""One training step: a pure function from a training state and a batch to the next state."""
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from qwen_kernels.attention import causal_attention

from qwen_jax.config import ModelConfig
from qwen_jax.model.lora import LoraConfig
from qwen_jax.parallel.mesh import DATA, shardings_of
from qwen_jax.training.batch import Batch
from qwen_jax.training.loss import cross_entropy, distillation
from qwen_jax.training.recipe import Distill, Optimizer
from qwen_jax.training.stacked import hidden

Params = Mapping[str, jax.Array]
# (trainable, frozen, batch) -> (sum of weighted losses, (sum of weights, sums of other metrics by name))
Loss = Callable[[Params, Params, Batch], tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]]


class TrainState(NamedTuple):
    """What a step changes. Saved whole, it continues bit for bit."""
    trainable: dict[str, jax.Array]  # float32: stacked parameters, or an adapter
    optimizer: Any
    step: jax.Array                  # int32: batches seen
    skipped: jax.Array               # int32: of them, those without effect because of a non-finite gradient
    skipped_in_a_row: jax.Array      # int32: of the last ones


def make_optimizer(recipe: Optimizer, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping the gradient to a global norm; linear warm-up, cosine to zero; vectors do not decay."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, recipe.warmup_steps, steps)
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.adamw(schedule, b1=recipe.adam_b1, b2=recipe.adam_b2, eps=recipe.adam_eps,
                    weight_decay=recipe.weight_decay, mask=lambda params: {name: decays(name) for name in params}))


def decays(name: str) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases."""
    return not name.endswith((".scale", ".bqkv"))


def init_state(trainable: Params, optimizer: optax.GradientTransformation) -> TrainState:
    counts = (jnp.zeros((), jnp.int32) for _ in range(3))  # one array each: a step donates them
    return TrainState(dict(trainable), optimizer.init(dict(trainable)), *counts)


def language_model_loss(config: ModelConfig, *, lora: LoraConfig | None = None, recompute: bool = False,
                        compute_dtype="float32", shared_segment: int | None = None, fp8: Sequence[bool] = ()) -> Loss:
    """Next-token cross-entropy of full training, or of an adapter over frozen parameters.

    Stacked parameters (`training.stacked`) are the trainable, or with `lora` the frozen ones. Both are cast to
    `compute_dtype`. fp8: see `stacked.hidden`. Other metrics: ``accuracy``.
    """
    def loss(trainable: Params, frozen: Params, batch: Batch):
        params, adapter = (frozen, trainable) if lora else (trainable, None)
        states, model = hidden(config, params, batch.tokens, batch.positions, lambda q, k, v: causal_attention(
            q, k, v, segment_ids=batch.segment_ids, shared_segment=shared_segment), adapter=adapter,
            scale=lora.scale if lora else 1.0, recompute=recompute, compute_dtype=compute_dtype, fp8=fp8)
        weights = batch.weights[:, 1:]
        nll, right = cross_entropy(states[:, :-1], model.head_weight, batch.tokens[:, 1:], weights, train_head=not lora)
        return nll, (weights.sum(), {"accuracy": right})

    return loss


def distillation_loss(student: ModelConfig, teacher: ModelConfig, recipe: Distill, *, recompute: bool = False,
                      compute_dtype="float32", fp8: Sequence[bool] = ()) -> Loss:
    """`Loss` of a student; the frozen parameters are the teacher's. Other metrics: ``accuracy``, ``kl``.

    fp8: of the student; see `stacked.hidden`.
    """
    def loss(trainable: Params, frozen: Params, batch: Batch):
        def attend(q, k, v):
            return causal_attention(q, k, v, segment_ids=batch.segment_ids)

        (states, model), (wanted, guide) = (
            hidden(config, params, batch.tokens, batch.positions, attend, recompute=recompute,
                   compute_dtype=compute_dtype, fp8=fp8)
            for config, params, fp8 in ((student, trainable, fp8), (teacher, jax.lax.stop_gradient(frozen), ())))
        weights = batch.weights[:, 1:]
        total, right, kl = distillation(states[:, :-1], model.head_weight, wanted[:, :-1], guide.head_weight,
                                        batch.tokens[:, 1:], weights, recipe.temperature, recipe.kl_weight)
        return total, (weights.sum(), {"accuracy": right, "kl": kl})

    return loss


def kept_for_backward(loss: Loss, trainable: Params, frozen: Params, batch: Batch) -> int:
    """Bytes that the forward pass of `loss` keeps for the backward pass, parameters included. Only traces."""
    def backward(trainable):
        return jax.vjp(lambda trainable: loss(trainable, frozen, batch)[0], trainable)[1]

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(backward, trainable)))


def make_train_step(loss: Loss, optimizer: optax.GradientTransformation, accumulate: int = 1, mesh: Mesh | None = None,
                    specs: Mapping[str, PartitionSpec] = MappingProxyType({})) -> Callable:
    """The compiled step ``(state, frozen, batch) -> (state, metrics)``; `state` is donated.

    The batch's rows are worked on in `accumulate` groups, one after another, and their gradients added; loss and
    gradient are means over the weights of the whole batch. On a `mesh`, each of its data shards works on its part of
    the rows, and their gradients are added once, at the end; parameters are split as `specs` says, and state and frozen
    parameters must lie so (`parallel.mesh.shardings_of`). When any gradient is not finite the step changes nothing but
    its counters. metrics: float32 scalars ``loss``, ``gradient_norm`` (before clipping), the loss's own; ``finite``
    bool by trainable parameter.
    """
    def gradient_of(trainable, frozen, batch):
        return jax.value_and_grad(loss, has_aux=True)(trainable, frozen, batch)

    def summed(trainable, frozen, batch):
        if accumulate == 1:
            return gradient_of(trainable, frozen, batch)
        groups = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
        shapes = jax.eval_shape(gradient_of, trainable, frozen, jax.tree.map(lambda x: x[0], groups))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(sums, group):
            return jax.tree.map(jnp.add, sums, gradient_of(trainable, frozen, group)), None

        return jax.lax.scan(add, zeros, groups)[0]

    def over_data(trainable, frozen, batch):
        return jax.lax.psum(summed(trainable, frozen, batch), DATA)

    gradient_sums = summed
    if mesh and mesh.shape[DATA] > 1:  # only the data axis is manual: the partitioner sees to the tensor axis within
        whole, split = PartitionSpec(), PartitionSpec(DATA)
        gradient_sums = jax.shard_map(over_data, mesh=mesh, in_specs=(whole, whole, split), out_specs=whole,
                                      axis_names={DATA}, check_vma=False)

    def step(state: TrainState, frozen: Params, batch: Batch):
        (total, (weight, sums)), gradient = gradient_sums(state.trainable, frozen, batch)
        scale = 1 / jnp.maximum(weight, 1e-6)
        gradient = jax.tree.map(lambda g: g * scale, gradient)
        finite = {name: jnp.isfinite(jnp.square(g).sum()) for name, g in gradient.items()}
        sound = jnp.all(jnp.stack(list(finite.values())))
        def update(trainable, opt_state):
            updates, opt_state = optimizer.update(gradient, opt_state, trainable)
            return optax.apply_updates(trainable, updates), opt_state

        trainable, opt_state = jax.lax.cond(sound, update, lambda *unchanged: unchanged, state.trainable,
                                            state.optimizer)
        metrics = {"loss": total * scale, "gradient_norm": optax.global_norm(gradient),
                   **{name: value * scale for name, value in sums.items()}, "finite": finite}
        counts = state.step + 1, state.skipped + ~sound, jnp.where(sound, 0, state.skipped_in_a_row + 1)
        new = TrainState(trainable, opt_state, *counts)
        return jax.lax.with_sharding_constraint(new, shardings_of(new, mesh, specs)) if mesh else new, metrics

    compiled = jax.jit(step, donate_argnums=0)
    if mesh is None:
        return compiled
    rows = NamedSharding(mesh, PartitionSpec(DATA))
    return lambda state, frozen, batch: compiled(state, frozen, jax.device_put(batch, rows))
