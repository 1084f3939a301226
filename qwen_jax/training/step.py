"""One training step: a pure function from parameters, optimiser state and a batch to the next ones."""
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qwen_jax.model import Qwen2
from qwen_jax.training.attention import blocked_causal_attention
from qwen_jax.training.data import Batch
from qwen_jax.training.loss import next_token_loss
from qwen_jax.training.recipe import Recipe


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW after clipping the gradient to a global norm; linear warm-up, cosine to zero; vectors do not decay."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, recipe.warmup_steps, recipe.steps)
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.adamw(schedule, b2=recipe.adam_b2, weight_decay=recipe.weight_decay,
                    mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)))


def make_train_step(model: Qwen2, optimizer: optax.GradientTransformation) -> Callable:
    """The compiled step ``(params, opt_state, batch) -> (params, opt_state, metrics)``.

    `params` is the model's ``nnx.Param`` state (``nnx.state(model, nnx.Param)``); it and `opt_state` are donated.
    metrics: float32 scalars ``loss``, ``answer_loss``, ``verdict_accuracy``, ``gradient_norm`` (before clipping).
    """
    graph, _, rest = nnx.split(model, nnx.Param, ...)

    def loss_of(params, batch: Batch):
        model = nnx.merge(graph, params, rest)
        positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
        hidden = model.hidden(batch.tokens, positions, lambda _, q, k, v: blocked_causal_attention(q, k, v))
        return next_token_loss(model.logits(hidden), batch)

    def train_step(params, opt_state, batch: Batch):
        (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        metrics = {"loss": loss, **metrics, "gradient_norm": optax.global_norm(gradient)}
        return optax.apply_updates(params, updates), opt_state, metrics

    return jax.jit(train_step, donate_argnums=(0, 1))
