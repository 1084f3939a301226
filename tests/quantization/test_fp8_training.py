"""Products that are computed in 8 bits forward and backward, and training with them."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_dtypes import float8_e4m3fn, float8_e5m2
from qwen_kernels.attention import causal_attention

from qwen_jax.config import ModelConfig, Rope
from qwen_jax.model import build, init, params_of
from qwen_jax.model.lora import LoraConfig, init_adapter
from qwen_jax.quantization import QuantizedTensor, TrainedInFP8, default_precision, product, quantize, widened
from qwen_jax.training.batch import Batch
from qwen_jax.training.recipe import Optimizer
from qwen_jax.training.stacked import hidden, stack, unstack
from qwen_jax.training.step import init_state, language_model_loss, make_optimizer, make_train_step

CONFIG = ModelConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=4, num_heads=4, num_kv_heads=2,
                     head_dim=8, max_position_embeddings=256, rope=Rope(10_000.0), tie_word_embeddings=True,
                     dtype="float32")
FP8 = default_precision(CONFIG, True, None)
PRODUCTS = [("btd,nd->btn", (2, 6, 64), (40, 64)), ("gbtd,gfd->gbtf", (2, 2, 6, 64), (2, 24, 64))]


def rounded(x, axes, dtype):
    """Round to 8 bits with a common scale over ``axes`` by NumPy and ml_dtypes, and return the values in float64."""
    x = np.asarray(x, np.float32)
    scale = np.abs(x).max(axis=axes, keepdims=True) / np.float32(ml_largest(dtype))
    return (x / scale).astype(dtype).astype(np.float64) * scale


def ml_largest(dtype):
    return {float8_e4m3fn: 448, float8_e5m2: 57344}[dtype]


def contracted(spec, operand):
    axes, result = spec.split("->")[0].split(",")[operand], spec.split("->")[1]
    return tuple(i for i, axis in enumerate(axes) if axis not in result)


def inputs(x, weight, seed=0):
    rng = np.random.default_rng(seed)
    size = np.logspace(-4, 2, x[-1]).astype(np.float32)  # channels of very different sizes
    return jnp.asarray(rng.normal(size=x) * size, jnp.float32), jnp.asarray(rng.normal(size=weight), jnp.float32)


def pulled_back(spec, x, weight, gradient):
    out, backward = jax.vjp(lambda x, w: product(spec, x, TrainedInFP8(w)), x, weight)
    return out, *backward(gradient)


@pytest.mark.parametrize("spec, x, weight", PRODUCTS)
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e9])
def test_all_three_products_are_of_rounded_operands(spec, x, weight, size):
    x, weight = inputs(x, weight)
    shape = jax.eval_shape(lambda: product(spec, x, weight)).shape
    gradient = jnp.asarray(np.random.default_rng(1).normal(size=shape) * size, jnp.float32)
    out, of_x, of_weight = jax.jit(pulled_back, static_argnums=0)(spec, x, weight, gradient)
    (a, b), result = spec.split("->")[0].split(","), spec.split("->")[1]
    for got, einsum, first, second, kind in (
            (out, spec, x, weight, float8_e4m3fn), (of_x, f"{result},{b}->{a}", gradient, weight, float8_e5m2),
            (of_weight, f"{result},{a}->{b}", gradient, x, float8_e5m2)):
        exact = np.einsum(einsum, np.asarray(first, np.float64), np.asarray(second, np.float64))
        want = np.einsum(einsum, rounded(first, contracted(einsum, 0), kind),
                         rounded(second, contracted(einsum, 1), float8_e4m3fn))
        # A value in the middle between two others may go to either: XLA divides by multiplying with the reciprocal.
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 5e-3
        assert 5e-3 < np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.12


@pytest.mark.parametrize("spec, x, weight", PRODUCTS)
@pytest.mark.parametrize("wide", [False, True])
def test_a_frozen_weight_passes_gradients_on(spec, x, weight, wide):
    x, weight = inputs(x, weight)
    frozen = quantize(weight, 1)
    frozen = widened(frozen) if wide else frozen
    plain = frozen.dequantize(jnp.float32)

    def pulled(weight):
        out, backward = jax.vjp(lambda x: product(spec, x, weight), x)
        return backward(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))[0]

    got, want = (np.asarray(jax.jit(pulled)(w)) for w in (frozen, plain))
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 1e-5 if wide else 5e-3 < error < 0.1


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = np.tile(rng.integers(0, 96, (2, 8)), (1, 4)).astype(np.int32)  # said four times: there is much to learn
    return Batch(tokens, np.ones((2, 32), np.float32), np.zeros((2, 32), np.int32),
                 np.tile(np.arange(32, dtype=np.int32), (2, 1)))


def test_only_the_inner_layers_and_as_an_fp8_model_computes():
    params = params_of(init(CONFIG, 0, "float32"))
    stored = {path: FP8.store(path, value) for path, value in params.items()}
    assert {path.split(".")[1] for path, value in stored.items() if isinstance(value, QuantizedTensor)} == {"1", "2"}
    data = batch()
    want = jax.jit(lambda p: build(CONFIG, p).hidden(data.tokens, data.positions, lambda _, *qkv: causal_attention(
        *qkv)))(stored)

    def states(stacked):
        return hidden(CONFIG, stacked, data.tokens, data.positions, causal_attention, fp8=FP8.weights)[0]

    for given in (params, stored):
        np.testing.assert_allclose(jax.jit(states)(stack(given)), want, atol=2e-5)
    again = unstack(stack(stored))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, stored))


@pytest.mark.parametrize("lora", [None, LoraConfig(4, 8.0, ("q_proj", "v_proj", "o_proj", "down_proj"))])
def test_training_keeps_up_with_full_precision(lora):
    losses = {}
    for name, fp8 in (("float32", ()), ("FP8", FP8.weights)):
        optimizer = make_optimizer(Optimizer(learning_rate=1e-2), 60)
        step = make_train_step(language_model_loss(CONFIG, lora=lora, fp8=fp8, recompute=bool(fp8)), optimizer)
        params = params_of(init(CONFIG, 0, "float32"))  # a step donates them
        base = stack({path: FP8.store(path, value) for path, value in params.items()} if fp8 and lora else params)
        state = init_state(init_adapter(CONFIG, lora) if lora else base, optimizer)
        frozen, seen = base if lora else {}, []
        for _ in range(60):
            state, metrics = step(state, frozen, batch())
            seen.append(float(metrics["loss"]))
        assert int(state.skipped) == 0
        losses[name] = seen
    assert losses["FP8"][-1] < 0.6 * losses["FP8"][0] and losses["FP8"] != losses["float32"]
    assert losses["FP8"][-1] < 1.05 * losses["float32"][-1] + 0.02


def test_what_is_not_finite_is_skipped_and_counted():
    optimizer = make_optimizer(Optimizer(learning_rate=1e-2), 10)
    step = make_train_step(language_model_loss(CONFIG, fp8=FP8.weights), optimizer)
    state = init_state(stack(params_of(init(CONFIG, 0, "float32"))), optimizer)
    before = jax.device_get(state.trainable)
    bad = dict(state.trainable)
    name = "layers.mlp.down"
    bad[name] = bad[name].at[1, 0, 0].set(jnp.inf)
    state, metrics = step(state._replace(trainable=bad), {}, batch())
    assert int(state.skipped) == 1 and not np.isfinite(metrics["loss"])
    after = {k: v for k, v in jax.device_get(state.trainable).items() if k != name}
    assert all((after[k] == before[k]).all() for k in after)
