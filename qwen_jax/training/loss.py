"""Next-token loss, over a vocabulary too large for its logits to exist all at once."""
from functools import partial

import jax
import jax.numpy as jnp

LOGITS_AT_ONCE = 1 << 24  # numbers: 64 MiB in float32


def _chunked(length: int, rows: int, vocab: int):
    """A function that cuts ``[B, T, ...]`` into ``[chunks, B, c, ...]``, zeros at the end, for chunks of logits."""
    chunk = min(length, max(-(-64 // rows), LOGITS_AT_ONCE // (rows * vocab)))

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(rows, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    return cut


def cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array,
                  train_head: bool = True) -> tuple[jax.Array, jax.Array]:
    """Sums over all tokens of ``weight · -log p(target)``, in nats, and of the weights of tokens predicted right.

    hidden ``[B, T, D]``, head ``[V, D]``, targets (int32) and weights (float32) ``[B, T]``. Returns two float32
    scalars. A token is predicted right when no other has a higher probability.

    Never more than a chunk of each row's tokens has logits. Gradients are made with the loss, chunk by chunk, so no
    logits are computed twice; that of the head only with `train_head` (else it is zero). Targets and weights have none.
    """
    cut = _chunked(hidden.shape[1], hidden.shape[0], len(head))
    return _summed(train_head, cut(hidden), head, cut(targets), cut(weights))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(train_head, hidden, head, targets, weights):
    def body(sums, item):
        nll, right, _ = _chunk(head, *item)
        return (sums[0] + nll, sums[1] + right), None

    return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), (hidden, targets, weights))[0]


def _chunk(head, hidden, targets, weights):
    """Sums of one chunk, and the gradient ``[B, c, V]`` of its loss with respect to its logits: p - onehot, weighted.

    Reductions over the vocabulary are sums and maxima, so that they can run where a split head's logits are.
    """
    logits = jnp.einsum("bcd,vd->bcv", hidden, head, preferred_element_type=jnp.float32)
    top = logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - top)
    total = exponentials.sum(axis=-1, keepdims=True)
    onehot = jnp.arange(len(head)) == targets[..., None]
    chosen = jnp.where(onehot, logits, 0).sum(axis=-1)
    nll = ((jnp.log(total) + top)[..., 0] - chosen) * weights
    right = (chosen >= top[..., 0]) * weights
    return nll.sum(), right.sum(), (exponentials / total - onehot) * weights[..., None]


def _forward(train_head, hidden, head, targets, weights):
    def body(carry, item):
        nll, right, of_head = carry
        more, more_right, of_logits = _chunk(head, *item)
        of_logits = of_logits.astype(head.dtype)
        of_hidden = jnp.einsum("bcv,vd->bcd", of_logits, head, preferred_element_type=jnp.float32)
        if train_head:
            of_head += jnp.einsum("bcv,bcd->vd", of_logits, item[0], preferred_element_type=jnp.float32)
        return (nll + more, right + more_right, of_head), of_hidden.astype(hidden.dtype)

    of_head = jnp.zeros(head.shape if train_head else (), jnp.float32)
    (nll, right, of_head), of_hidden = jax.lax.scan(body, (jnp.float32(0), jnp.float32(0), of_head),
                                                    (hidden, targets, weights))
    return (nll, right), (of_hidden, of_head, head)


def _backward(train_head, residuals, cotangents):
    of_hidden, of_head, head = residuals
    scale, _ = cotangents  # counting what is right has no gradient
    of_head = (of_head * scale).astype(head.dtype) if train_head else jnp.zeros_like(head)
    return (of_hidden * scale).astype(of_hidden.dtype), of_head, None, None


_summed.defvjp(_forward, _backward)


def distillation(hidden: jax.Array, head: jax.Array, teacher_hidden: jax.Array, teacher_head: jax.Array,
                 targets: jax.Array, weights: jax.Array, temperature: float, kl_weight: float
                 ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted sums over all tokens: the loss of `recipe.Distill`, the tokens predicted right, the divergence.

    hidden ``[B, T, D]``, head ``[V, D]`` of the student and of the teacher (their D may differ); targets and weights
    ``[B, T]``. Three float32 scalars, in nats. Chunk by chunk; the backward pass makes the logits again.
    """
    cut = _chunked(hidden.shape[1], hidden.shape[0], len(head))
    wide = head.astype(jnp.float32)  # gradients of all chunks are added in float32

    @jax.checkpoint
    def body(sums, item):
        hidden, teacher_hidden, targets, weights = item
        student = jnp.einsum("bcd,vd->bcv", hidden, wide.astype(head.dtype), preferred_element_type=jnp.float32)
        teacher = jnp.einsum("bcd,vd->bcv", teacher_hidden, teacher_head, preferred_element_type=jnp.float32)
        onehot = jnp.arange(len(head)) == targets[..., None]
        chosen = jnp.where(onehot, student, 0).sum(axis=-1)
        nll = jax.nn.logsumexp(student, axis=-1) - chosen
        log_p, log_q = (jax.nn.log_softmax(logits / temperature) for logits in (student, teacher))
        kl = (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1)
        each = (1 - kl_weight) * nll + kl_weight * temperature ** 2 * kl
        new = (each * weights).sum(), ((chosen >= student.max(axis=-1)) * weights).sum(), (kl * weights).sum()
        return jax.tree.map(jnp.add, sums, new), None

    zero = jnp.float32(0)
    return jax.lax.scan(body, (zero, zero, zero), tuple(map(cut, (hidden, teacher_hidden, targets, weights))))[0]
