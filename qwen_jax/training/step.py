"""One training step: a pure function from a training state and a batch to the next state."""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from qwen_kernels.attention import causal_attention

from qwen_jax.config import ModelConfig
from qwen_jax.model.lora import LoraConfig
from qwen_jax.training.batch import Batch
from qwen_jax.training.loss import cross_entropy
from qwen_jax.training.recipe import Optimizer
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
                        compute_dtype="float32", shared_segment: int | None = None) -> Loss:
    """Next-token cross-entropy of full training, or of an adapter over frozen parameters.

    Stacked parameters (`training.stacked`) are the trainable, or with `lora` the frozen ones. Trainable values are cast
    to `compute_dtype`; frozen ones are used as they are. Other metrics: ``accuracy``.
    """
    def loss(trainable: Params, frozen: Params, batch: Batch):
        trainable = {name: value.astype(compute_dtype) for name, value in trainable.items()}
        params, adapter = (frozen, trainable) if lora else (trainable, None)
        states, model = hidden(config, params, batch.tokens, batch.positions, lambda q, k, v: causal_attention(
            q, k, v, segment_ids=batch.segment_ids, shared_segment=shared_segment), adapter=adapter,
            scale=lora.scale if lora else 1.0, recompute=recompute)
        weights = batch.weights[:, 1:]
        nll, right = cross_entropy(states[:, :-1], model.head_weight, batch.tokens[:, 1:], weights, train_head=not lora)
        return nll, (weights.sum(), {"accuracy": right})

    return loss


def make_train_step(loss: Loss, optimizer: optax.GradientTransformation, accumulate: int = 1) -> Callable:
    """The compiled step ``(state, frozen, batch) -> (state, metrics)``; `state` is donated.

    The batch's rows are worked on in `accumulate` groups, one after another, and their gradients added; loss and
    gradient are means over the weights of the whole batch. When any gradient is not finite the step changes nothing but
    its counters. metrics: float32 scalars ``loss``, ``gradient_norm`` (before clipping), the loss's own; ``finite``
    bool by trainable parameter.
    """
    def gradient_of(trainable, frozen, batch):
        return jax.value_and_grad(loss, has_aux=True)(trainable, frozen, batch)

    def step(state: TrainState, frozen: Params, batch: Batch):
        if accumulate == 1:
            (total, (weight, sums)), gradient = gradient_of(state.trainable, frozen, batch)
        else:
            groups = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
            shapes = jax.eval_shape(gradient_of, state.trainable, frozen, jax.tree.map(lambda x: x[0], groups))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

            def add(sums, group):
                return jax.tree.map(jnp.add, sums, gradient_of(state.trainable, frozen, group)), None

            ((total, (weight, sums)), gradient), _ = jax.lax.scan(add, zeros, groups)
        scale = 1 / jnp.maximum(weight, 1e-6)
        gradient = jax.tree.map(lambda g: g * scale, gradient)
        finite = {name: jnp.isfinite(jnp.square(g).sum()) for name, g in gradient.items()}
        sound = jnp.all(jnp.stack(list(finite.values())))
        updates, opt_state = optimizer.update(gradient, state.optimizer, state.trainable)
        new = optax.apply_updates(state.trainable, updates), opt_state
        trainable, opt_state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), new,
                                            (state.trainable, state.optimizer))
        metrics = {"loss": total * scale, "gradient_norm": optax.global_norm(gradient),
                   **{name: value * scale for name, value in sums.items()}, "finite": finite}
        counts = state.step + 1, state.skipped + ~sound, jnp.where(sound, 0, state.skipped_in_a_row + 1)
        return TrainState(trainable, opt_state, *counts), metrics

    return jax.jit(step, donate_argnums=0)
