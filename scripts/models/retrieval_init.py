"""Initial values whose attention heads already look back, match and copy, because retrieval is built on these.

A random transformer spends most of a short training run learning to note which tokens precede a token, to look for
earlier places that the same token preceded, and to expect what came there (induction heads,
https://arxiv.org/abs/2209.11895). Initial values alone can do all of it; training is free to change them.

 - Tokens are embedded in one half of the residual's dimensions, the token half; the rest is the context half. (Where
   heads are smaller than half of the residual, the context half has as many dimensions as a head, and heads read as
   many of the token half.)
 - Layer 0 looks back a fixed number of tokens and writes the tokens found into the context half, the token just before
   most strongly. With a key bias k and a query bias R(-d) k in rotary planes that turn fast, the score of a key n
   tokens back is a sum of cos((n - d) θ_j): largest at n = d.
 - Layer 1, first KV group: a token looks for places that have noted the same token before them, and copies the token
   that stands there into its own token half: the model begins by expecting what followed last time.
 - Layer 1, second KV group: a token looks for equal tokens (and, by biases of opposite signs in the fast planes, not
   for itself) and copies what had been noted there.
 - Every other branch adds little to the residual at first.

Matching happens in rotary planes that turn slowly, where scores hardly depend on the distance.
"""
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError

BRANCH_SCALE = 0.1                  # factor of the output projections of all branches
OFFSETS = (1, 2, 3, 4)              # tokens back, by query head of layer 0
NOTE_SCALES = (0.1, 0.05, 0.03, 0.03)  # size of each head's note, in units of the normalised residual
OFFSET_STRENGTH = 8.0               # key bias per plane: a neighbour of the wanted key scores about 6 less
MATCH_SCORE = 14.0                  # score of a place that fits; hundreds of other places add up to less
COPY_SCALE = 0.5                    # size of the first group's copy: about four times the token's own embedding
RECALL_SCALE = 0.1                  # size of the second group's copy
AVOID_STRENGTH = 3.0                # biases that keep a token from itself: score 6 less for itself, 1.5 more elsewhere
FAST = 0.05                         # radians per token: planes that turn faster tell neighbours apart
SLOW_TURN = 3.0                     # radians over the whole reach: planes that turn less serve to match


def prepare_for_retrieval(params: dict, config: ModelConfig, seed: int = 0, reach: int = 500) -> dict[str, np.ndarray]:
    """Return a copy of random float32 `params` (path to array) whose first two layers look back, match and copy tokens.

    reach: number of tokens over which heads find a match at the start.

    Raises UserError unless the model has at least two layers, two KV groups, an even hidden size, and heads of at
    least a third of that size.
    """
    half = min(config.hidden_size // 2, config.head_dim)  # dimensions that a head carries
    if config.num_layers < 2 or config.num_kv_heads < 2 or config.hidden_size % 2 or 3 * half < config.hidden_size:
        raise UserError("a model prepared for retrieval needs at least 2 layers, 2 KV groups, an even hidden size and "
                        "heads of at least a third of it")
    params, rng = {path: np.array(value) for path, value in params.items()}, np.random.default_rng(seed)
    theta, _ = config.rope.frequencies(config.head_dim)
    fast, slow = (np.tile(turns, 2).astype(np.float32) for turns in (theta >= FAST, theta <= SLOW_TURN / reach))

    def first_half(planes: np.ndarray) -> np.ndarray:  # channels i and i + H / 2 make a plane
        return planes * (np.arange(config.head_dim) < config.head_dim // 2)

    for path, value in params.items():
        if path.endswith(("attention.wo", "mlp.down")):
            value *= BRANCH_SCALE
    basis = np.linalg.qr(rng.normal(size=(config.hidden_size,) * 2))[0].T.astype(np.float32)
    token_half, context = basis[:-half], basis[-half:]  # orthonormal; [D / 2, D] each
    carried = np.eye(config.head_dim, half, dtype=np.float32)  # [H, D / 2]: a head carries one half
    params["embed.weight"] = ((config.hidden_size / len(token_half)) ** .5 * params["embed.weight"]
                              @ token_half.T @ token_half)
    token = token_half[:half]

    weight, bias, out = (params[f"layers.0.attention.{name}"] for name in ("wqkv", "bqkv", "wo"))
    weight[:, :-1] *= 0.1
    weight[:, -1] = carried @ token
    for head, offset, scale in zip(range(config.num_heads), OFFSETS, NOTE_SCALES):
        group, row = divmod(head, config.group_size)
        bias[group, row] = OFFSET_STRENGTH * fast * np.concatenate([np.cos(offset * theta), -np.sin(offset * theta)])
        bias[group, -2] = OFFSET_STRENGTH * first_half(fast)
        turned = context if head == 0 else np.linalg.qr(rng.normal(size=(half, half)))[0] @ context
        out[:, group, row] = scale * (carried @ turned).T

    # Of the normalised residual, each half has about D / 2 coordinates of size 1.
    mixed = np.linalg.qr(rng.normal(size=(config.head_dim,) * 2))[0][:, :half] * slow[:, None]  # [H, D / 2]
    mixed *= (MATCH_SCORE * config.head_dim ** .5 / (mixed ** 2).sum()) ** .5
    weight, bias, out = (params[f"layers.1.attention.{name}"] for name in ("wqkv", "bqkv", "wo"))
    weight[0, :-2], weight[0, -2], weight[0, -1] = mixed @ token, mixed @ context, carried @ token
    out[:, 0] = COPY_SCALE / config.group_size * (carried @ token).T[:, None]
    weight[1, :-1], weight[1, -1] = mixed @ token, carried @ context
    bias[1, :-2], bias[1, -2] = -AVOID_STRENGTH * first_half(fast), AVOID_STRENGTH * first_half(fast)
    out[:, 1] = RECALL_SCALE / config.group_size * (carried @ context).T[:, None]
    return params
