"""Where training starts: attention heads that already look back and match, because retrieval is built on them.

A random transformer spends most of a short training run finding out that it should note which tokens precede a token,
and look for earlier tokens in the same surroundings (induction heads, https://arxiv.org/abs/2209.11895). Both can be
had at the start from the initial values alone; training is free to change them.

 - Layer 0 looks back a fixed number of tokens. With a key bias k and a query bias R(-d) k in rotary planes that turn
   fast, the score of a key n tokens back is a sum of cos((n - d) θ_j): largest at n = d.
 - Layer 0 writes into one half of the residual's dimensions only; call it the context half.
 - Layer 1, first KV group: query and key projections are equal (https://arxiv.org/abs/2305.09828) and blind to the
   context half, so a token finds its like, and, by biases of opposite signs in the fast planes, not itself; the
   value is what stood before it there. Layer 2 does the same with sight of the context half: whole phrases find
   their like.
 - Layers 1 and 2, second KV group: the key reads what layer 0 noted of the token before, the query reads the token
   itself as layer 0 noted it. So a token finds what followed its like.
 - Every branch adds less to the residual than usual, so that tokens stay visible under their context.

Matching happens in rotary planes that turn slowly, where scores hardly depend on the distance.
"""
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError

BRANCH_SCALE = 0.1
FOUND_SCALE = 5.0        # what a token's like was preceded by weighs more again
OFFSETS = (1, 2, 3, 4)   # tokens back, by query head of layer 0
OFFSET_STRENGTH = 8.0    # of the key bias, per plane: a neighbour of the wanted key scores about 6 less
MATCHING_LAYERS = (1, 2)
MATCH_SCORE = 30.0       # of two equal residuals
AVOID_STRENGTH = 3.0     # of the biases that keep a token from itself: 6 less for itself, at most 1.5 more elsewhere
FAST, SLOW = 0.05, 0.006  # radians per token: planes above FAST tell neighbours apart, below SLOW they ignore position


def prepare_for_retrieval(params: dict, config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 `params` (canonical path to array) with the changes above; returns a new mapping.

    UserError unless the model has at least three layers, four heads and two KV groups.
    """
    if config.num_layers < 3 or config.num_heads < len(OFFSETS) or config.num_kv_heads < 2:
        raise UserError("a model prepared for retrieval needs at least 3 layers, 4 heads and 2 KV heads")
    params, rng = {path: np.array(value) for path, value in params.items()}, np.random.default_rng(seed)
    for path, value in params.items():
        if path.endswith(("attention.wo", "mlp.down")):
            value *= BRANCH_SCALE
    theta, _ = config.rope.frequencies(config.head_dim)
    fast, slow = (theta >= FAST).astype(np.float32), np.tile(theta <= SLOW, 2)[:, None]

    def first_half(plane: np.ndarray) -> np.ndarray:  # channels i and i + H / 2 make a plane
        return np.concatenate([plane, np.zeros_like(plane)])

    def projections(layer: int):  # [K, G + 2, H, D] and [K, G + 2, H]: a group's queries, its key, its value
        return params[f"layers.{layer}.attention.wqkv"], params[f"layers.{layer}.attention.bqkv"]

    weight, bias = projections(0)
    for head, offset in enumerate(OFFSETS):
        group, row = divmod(head, config.group_size)
        bias[group, row] = OFFSET_STRENGTH * np.tile(fast, 2) * np.concatenate([np.cos(offset * theta),
                                                                                -np.sin(offset * theta)])
        bias[group, -2] = OFFSET_STRENGTH * first_half(fast)
        weight[group, [row, -2]] *= 0.1
    out = params["layers.0.attention.wo"]  # [D, K, G, H]
    basis = np.linalg.qr(rng.normal(size=(config.hidden_size,) * 2))[0]
    context, free = np.split(basis, 2, axis=1)  # [D, D / 2] each, orthonormal
    mixed = np.linalg.qr(rng.normal(size=(out[0].size, context.shape[1])))[0].T  # [D / 2, K G H]
    out[...] = 2 ** .5 * BRANCH_SCALE * (context @ mixed).reshape(out.shape)
    noted = weight[0, -1]            # [H, D]: token -> what the group's heads carry
    written = out[:, 0, 0].T         # [H, D]: where offset 1 leaves it

    score = MATCH_SCORE * config.head_dim ** .5 / (slow.sum() * config.hidden_size)  # query · key per D of residual
    for layer in MATCHING_LAYERS:
        weight, bias = projections(layer)
        matched = rng.normal(0, score ** .5, noted.shape) * slow
        weight[0, :-1] = matched @ (2 ** .5 * free @ free.T) if layer == 1 else matched
        bias[0, :-2], bias[0, -2] = -AVOID_STRENGTH * first_half(fast), AVOID_STRENGTH * first_half(fast)
        weight[1, :-2], weight[1, -2] = (w / w.std() * score ** .5 * slow for w in (noted, written))
    before = params["layers.1.attention.wqkv"][0, -1]
    before[...] = written / written.std() * before.std()
    params["layers.1.attention.wo"][:, 0] *= FOUND_SCALE
    return params
