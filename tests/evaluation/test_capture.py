"""Captured activations and attention against transformers' own hidden states and attentions."""
import jax
import numpy as np
import pytest
import torch
from flax import nnx
from oracle import random_qwen2

from qwen_jax.checkpoint import from_transformers
from qwen_jax.errors import UserError
from qwen_jax.evaluation.capture import attention_mass, capture, page_mass
from qwen_jax.model import build

SITES = [f"layers.{layer}{part}" for layer in range(2) for part in ("", ".attention", ".attention.q", ".attention.k",
                                                                     ".attention.v", ".mlp")] + ["norm"]
TOKENS = np.random.default_rng(0).integers(0, 320, (2, 100))


@pytest.fixture(scope="module")
def theirs():
    """Return transformers' hidden states, attentions, and outputs of the two branches and the value projections."""
    model, seen = random_qwen2(), {}
    for index, layer in enumerate(model.model.layers):
        for name, module in ((".attention", layer.self_attn.o_proj), (".mlp", layer.mlp),
                             (".attention.v", layer.self_attn.v_proj)):
            module.register_forward_hook(lambda _, __, out, name=f"layers.{index}{name}": seen.update({name: out}))
    with torch.no_grad():
        out = model(torch.as_tensor(TOKENS), output_hidden_states=True, output_attentions=True, use_cache=False)
    seen |= {"layers.0": out.hidden_states[1], "norm": out.hidden_states[2]}
    return model, {name: value.numpy() for name, value in seen.items()}, [a.numpy() for a in out.attentions]


@pytest.fixture(scope="module", params=["eager", "jit"])
def ours(request, theirs):
    model = build(*from_transformers(theirs[0]))

    def run(tokens):
        with capture(model, SITES) as captured:
            logits = model(tokens)
        return logits, dict(captured)

    return (jax.jit(run) if request.param == "jit" else run)(TOKENS)[1]


def test_activations_are_transformers_own(ours, theirs):
    assert set(ours) == set(SITES)
    for name, expected in theirs[1].items():
        np.testing.assert_allclose(np.asarray(ours[name]).reshape(expected.shape), expected, atol=2e-4, err_msg=name)


def test_attention_mass_is_transformers_own(ours, theirs):
    for layer, expected in enumerate(theirs[2]):
        mass = attention_mass(*(ours[f"layers.{layer}.attention.{name}"] for name in "qk"))
        np.testing.assert_allclose(mass, expected, atol=2e-5)
        pages = page_mass(mass)
        assert pages.shape == (2, 4, 100, 2)
        np.testing.assert_allclose(pages[..., 0], expected[..., :64].sum(-1), atol=1e-5)


def test_attention_mass_of_packed_rows(theirs):
    model = build(*from_transformers(theirs[0]))
    segments = np.repeat([[0, 1]], 50, axis=1)
    with capture(model, ["layers.0.attention.q", "layers.0.attention.k"]) as captured:
        model(TOKENS[:1], segment_ids=segments)
    mass = np.asarray(attention_mass(*captured.values(), segment_ids=segments))
    assert mass[..., 50:, :50].max() == 0 and np.allclose(mass.sum(-1), 1)


def test_it_costs_nothing_outside_of_a_block_and_what_is_not_returned_costs_nothing_inside(theirs):
    model = build(*from_transformers(theirs[0]))
    graph, params = nnx.split(model)

    def plain(params, tokens):
        return nnx.merge(graph, params)(tokens)

    def observed(params, tokens):
        model = nnx.merge(graph, params)
        with capture(model, SITES):
            return model(tokens)

    flops = [jax.jit(run).lower(params, TOKENS).compile().cost_analysis()["flops"] for run in (plain, observed)]
    assert flops[0] == flops[1]
    before = {name: vars(kind)[name] for kind in {type(model.layers[0]), type(model.norm)} for name in vars(kind)}
    with pytest.raises(ZeroDivisionError), capture(model, SITES):
        model(TOKENS[:, :8])
        raise ZeroDivisionError
    after = {name: vars(kind)[name] for kind in {type(model.layers[0]), type(model.norm)} for name in vars(kind)}
    assert all(after[name] is before[name] for name in before)


@pytest.mark.parametrize("site", ["layers.2", "layers.0.attentions", "head", "layers.x.mlp"])
def test_an_unknown_site_is_refused(theirs, site):
    with pytest.raises(UserError, match="unknown site"), capture(build(*from_transformers(theirs[0])), [site]):
        pass


def test_another_model_is_not_observed(theirs):
    one, other = (build(*from_transformers(theirs[0])) for _ in range(2))
    with pytest.raises(UserError, match="layers.0 was not computed"), capture(one, ["layers.0"]):
        other(TOKENS[:, :8])
