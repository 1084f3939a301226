"""Next-token loss."""
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from qwen_jax.training.data import Batch


def next_token_loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Weighted mean cross-entropy in nats, and what it is made of.

    logits: float32 [B, T, V], row t predicts token t + 1. Returns a float32 scalar and the scalars ``answer_loss``
    (mean over tokens of weight 1), ``verdict_accuracy`` (argmax right at the first token of an answer).
    """
    targets, weights = batch.tokens[:, 1:], batch.weights[:, 1:]
    chosen = jnp.take_along_axis(logits[:, :-1], targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits[:, :-1], axis=-1) - chosen
    answers, verdict = (weights == 1).astype(jnp.float32), batch.verdict[:, 1:].astype(jnp.float32)
    right = (jnp.argmax(logits[:, :-1], axis=-1) == targets).astype(jnp.float32)
    metrics = {"answer_loss": (nll * answers).sum() / answers.sum().clip(1),
               "verdict_accuracy": (right * verdict).sum() / verdict.sum().clip(1)}
    return (nll * weights).sum() / weights.sum(), metrics
