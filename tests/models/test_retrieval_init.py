"""Initial values that look back, match and copy before any training."""
import numpy as np
import pytest
from qwen_kernels.attention import causal_attention
from retrieval_init import prepare_for_retrieval

from qwen_jax.config import ModelConfig, Rope
from qwen_jax.errors import UserError
from qwen_jax.model import build, init, params_of


def test_initial_values_expect_what_followed_last_time():
    config = ModelConfig(vocab_size=320, hidden_size=64, intermediate_size=48, num_layers=2, num_heads=4,
                         num_kv_heads=2, head_dim=64, rope=Rope(1e6), tie_word_embeddings=True)
    tokens = np.random.default_rng(0).permutation(300).astype(np.int32)[:100]
    tokens[65:95] = tokens[5:35]  # a passage said twice
    best = {}

    def attend(layer, q, k, v):
        scores = np.einsum("tkgh,skh->kgts", np.asarray(q[0]), np.asarray(k[0]))
        best[layer] = np.where(np.tril(np.ones((100, 100), bool)), scores, -np.inf).argmax(-1).reshape(4, 100)
        return causal_attention(q, k, v)

    model = build(config, prepare_for_retrieval(params_of(init(config, 0, "float32")), config))
    model.hidden(tokens[None], np.arange(100)[None], attend)
    for head, offset in enumerate((1, 2, 3, 4)):
        assert (best[0][head, offset:] == np.arange(100 - offset)).mean() > 0.9
    assert (best[1][:2, 65:95] == np.arange(6, 36)).mean() > 0.9  # by chance, one in eighty
    assert (best[1][2:, 65:95] == np.arange(5, 35)).mean() > 0.9
    assert (np.asarray(model(tokens[None]))[0, 65:94].argmax(-1) == tokens[66:95]).mean() > 0.9
    plain = init(config, 0, "float32")
    assert (np.asarray(plain(tokens[None]))[0, 65:94].argmax(-1) == tokens[66:95]).mean() < 0.1


@pytest.mark.parametrize("change", [{"num_layers": 1}, {"hidden_size": 63}, {"head_dim": 8, "hidden_size": 32}])
def test_a_model_that_cannot_be_prepared_is_refused(change):
    sizes = dict(vocab_size=320, hidden_size=64, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
                 head_dim=64, tie_word_embeddings=True)
    config = ModelConfig(**sizes | change)
    with pytest.raises(UserError, match="at least 2 layers"):
        prepare_for_retrieval(params_of(init(config)), config)
