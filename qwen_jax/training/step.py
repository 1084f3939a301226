"""Training step: a pure function from a training state and a batch to the next state."""
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
from qwen_jax.xla_flags import check_safe_flags

Params = Mapping[str, jax.Array]
# (trainable, frozen, batch) -> (sum of weighted losses, (sum of weights, sums of other metrics by name))
Loss = Callable[[Params, Params, Batch], tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]]


class TrainState(NamedTuple):
    """State of a training run, all that a step changes: parameters, optimizer and counters.

    A run continues bit for bit from a saved state.
    """
    trainable: dict[str, jax.Array]  # float32: stacked parameters, or an adapter
    optimizer: Any
    step: jax.Array                  # int32: number of batches seen
    skipped: jax.Array               # int32: number of batches without effect because of a non-finite gradient
    skipped_in_a_row: jax.Array      # int32: number of the latest batches in a row without effect


def make_optimizer(recipe: Optimizer, steps: int) -> optax.GradientTransformation:
    """Return AdamW with gradient clipping by global norm, linear warm-up, cosine decay, weight decay of matrices."""
    # A step's rate is that of the number of steps before it: 0 at first would be a step without effect.
    first = recipe.learning_rate / (recipe.warmup_steps + 1)
    schedule = optax.warmup_cosine_decay_schedule(first, recipe.learning_rate, recipe.warmup_steps, steps)
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.adamw(schedule, b1=recipe.adam_b1, b2=recipe.adam_b2, eps=recipe.adam_eps,
                    weight_decay=recipe.weight_decay, mask=lambda params: {name: decays(name) for name in params}))


def decays(name: str) -> bool:
    """Tell whether weight decay applies to a parameter: to matrices, not to norms and biases."""
    return not name.endswith((".scale", ".bqkv"))


def init_state(trainable: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state of a training run before its first step."""
    counts = (jnp.zeros((), jnp.int32) for _ in range(3))  # separate arrays, because a step donates each of them
    return TrainState(dict(trainable), optimizer.init(dict(trainable)), *counts)


def language_model_loss(config: ModelConfig, *, lora: LoraConfig | None = None, recompute: bool = False,
                        compute_dtype="float32", shared_segment: int | None = None, fp8: Sequence[bool] = ()) -> Loss:
    """Return the loss function of fine-tuning: the next-token cross-entropy, to train all parameters or a LoRA adapter.

    The stacked parameters (`training.stacked`) are trainable, or with `lora` frozen. Both are cast to `compute_dtype`.
    shared_segment: segment that every other segment of a row attends to. fp8: see `stacked.hidden`. Other metrics:
    ``accuracy``.
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
                      compute_dtype="float32", shared_segment: int | None = None, fp8: Sequence[bool] = ()) -> Loss:
    """Return the loss function of distillation, to train a student; the frozen parameters are the teacher's.

    shared_segment: segment that every other segment of a row attends to. fp8 is for the student; see `stacked.hidden`.
    Other metrics: ``accuracy``, ``kl``.
    """
    def loss(trainable: Params, frozen: Params, batch: Batch):
        def attend(q, k, v):
            return causal_attention(q, k, v, segment_ids=batch.segment_ids, shared_segment=shared_segment)

        (states, model), (teacher_states, teacher_model) = (
            hidden(config, params, batch.tokens, batch.positions, attend, recompute=recompute,
                   compute_dtype=compute_dtype, fp8=fp8)
            for config, params, fp8 in ((student, trainable, fp8), (teacher, jax.lax.stop_gradient(frozen), ())))
        weights = batch.weights[:, 1:]
        total, right, kl = distillation(
            hidden=states[:, :-1], head=model.head_weight, teacher_hidden=teacher_states[:, :-1],
            teacher_head=teacher_model.head_weight, targets=batch.tokens[:, 1:], weights=weights,
            temperature=recipe.temperature, kl_weight=recipe.kl_weight)
        return total, (weights.sum(), {"accuracy": right, "kl": kl})

    return loss


def kept_for_backward(loss: Loss, trainable: Params, frozen: Params, batch: Batch) -> int:
    """Count the bytes that the forward pass keeps for the backward pass, parameters included. Traces, does not run."""
    def backward(trainable):
        return jax.vjp(lambda trainable: loss(trainable, frozen, batch)[0], trainable)[1]

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(backward, trainable)))


def make_train_step(loss: Loss, optimizer: optax.GradientTransformation, accumulate: int = 1, mesh: Mesh | None = None,
                    specs: Mapping[str, PartitionSpec] = MappingProxyType({})) -> Callable:
    """Return the compiled training step ``(state, frozen, batch) -> (state, metrics)``; `state` is donated.

    The batch's rows are processed in `accumulate` groups, one after another, and their gradients added; loss and
    gradient are means over the weights of the whole batch. On a `mesh`, each data shard works on its part of the rows,
    and their gradients are added once, at the end. Parameters are split by `specs`, and the state and the frozen
    parameters must already be placed so (`parallel.mesh.shardings_of`). When any gradient is not finite the step
    changes only its counters. metrics: float32 scalars ``loss``, ``gradient_norm`` (before clipping) and those of the
    loss; ``finite``: bool by trainable parameter.
    """
    check_safe_flags()

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
    if mesh and mesh.shape[DATA] > 1:  # only the data axis is manual; the partitioner handles the tensor axis
        whole, split = PartitionSpec(), PartitionSpec(DATA)
        gradient_sums = jax.shard_map(over_data, mesh=mesh, in_specs=(whole, whole, split), out_specs=whole,
                                      axis_names={DATA}, check_vma=False)

    def step(state: TrainState, frozen: Params, batch: Batch):
        (total, (weight, sums)), gradient = gradient_sums(state.trainable, frozen, batch)
        scale = 1 / jnp.maximum(weight, 1e-6)
        gradient = jax.tree.map(lambda g: g * scale, gradient)
        finite = {name: jnp.isfinite(jnp.square(g).sum()) for name, g in gradient.items()}
        all_finite = jnp.all(jnp.stack(list(finite.values())))

        def update(trainable, opt_state):
            updates, opt_state = optimizer.update(gradient, opt_state, trainable)
            return optax.apply_updates(trainable, updates), opt_state

        trainable, opt_state = jax.lax.cond(all_finite, update, lambda *unchanged: unchanged, state.trainable,
                                            state.optimizer)
        metrics = {"loss": total * scale, "gradient_norm": optax.global_norm(gradient),
                   **{name: value * scale for name, value in sums.items()}, "finite": finite}
        counts = state.step + 1, state.skipped + ~all_finite, jnp.where(all_finite, 0, state.skipped_in_a_row + 1)
        new = TrainState(trainable, opt_state, *counts)
        return jax.lax.with_sharding_constraint(new, shardings_of(new, mesh, specs)) if mesh else new, metrics

    compiled = jax.jit(step, donate_argnums=0)
    rows = mesh and NamedSharding(mesh, PartitionSpec(DATA))
    return compiled if mesh is None else lambda state, frozen, batch: compiled(
        state, frozen, jax.device_put(batch, rows))
