"""Fidelity of sparse attention against brute force, and the choice and the file of dense heads."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from oracle import random_qwen2
from qwen_kernels.attention import PAGE
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax import Engine
from qwen_jax.checkpoint import from_transformers, read_sparsity, resolve, write_sparsity
from qwen_jax.cli import main
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.engine.scheduling.schedule_policy import SchedulePolicy
from qwen_jax.errors import UserError
from qwen_jax.evaluation import calibrate_sparsity
from qwen_jax.evaluation.calibrate_sparsity import calibrate
from qwen_jax.evaluation.compare_selectors import compare, picture
from qwen_jax.evaluation.measured import Measured
from qwen_jax.evaluation.sparse_fidelity import SparseRun, Text, fidelity, observe, with_dense
from qwen_jax.evaluation.sparse_recall import Paged
from qwen_jax.model import build

SPARSITY = Sparsity(budget=0.5)
LAYERS = (SPARSITY,) * 2
TEXT = np.random.default_rng(0).integers(0, 320, 14 * PAGE - 9).tolist()


@pytest.fixture(scope="module")
def hf():
    return random_qwen2()


@pytest.fixture(scope="module")
def model(hf):
    return build(*from_transformers(hf, "float32"))


def test_fidelity_of_a_text(model):
    measured = fidelity(model, TEXT, LAYERS)
    assert 0.3 < measured.density < 0.8
    recall = measured.recall
    assert (recall.recall <= recall.reachable + 1e-6).all() and (recall.recall > 0.3).all()
    assert (recall.found <= recall.needed).all()
    assert (measured.cosine < 1).all() and (measured.cosine > 0.5).all()
    logits = np.asarray(jax.nn.log_softmax(model(np.array([TEXT]))[0], axis=-1))
    want = -np.mean(logits[np.arange(len(TEXT) - 1), TEXT[1:]])
    assert measured.full_loss == pytest.approx(want, abs=1e-4)
    assert measured.divergence > 1e-4


def test_full_attention_is_faithful(model):
    for everything in (Sparsity(budget=9), replace(SPARSITY, dense_heads=(0, 1))):
        measured = fidelity(model, TEXT, (everything,) * 2)
        assert measured.density == 1 and measured.divergence == pytest.approx(0, abs=1e-5)
        np.testing.assert_allclose(measured.cosine, 1, atol=1e-5)
        np.testing.assert_allclose([measured.recall.recall, measured.recall.reachable], 1)


@pytest.fixture
def any_help(monkeypatch):
    """Make calibration keep every change that helps."""
    monkeypatch.setattr(calibrate_sparsity, "MIN_GAIN", 0.0)
    monkeypatch.setattr(calibrate_sparsity, "MAX_ADDED", 1.0)


def test_the_head_that_matters_most_is_left_dense(model, any_help, monkeypatch):
    monkeypatch.setattr(calibrate_sparsity, "MAX_DENSE", 0.25)  # one of four
    monkeypatch.setattr(calibrate_sparsity, "MAX_BUDGET", 1)
    found = calibrate(model, [TEXT], SPARSITY)
    alone = {}
    for layer, head in np.ndindex(2, 2):
        with_it = replace(SPARSITY, dense_heads=(head,))
        layers = (with_it, SPARSITY) if layer == 0 else (SPARSITY, with_it)
        alone[layers] = fidelity(model, TEXT, layers).divergence
    assert found.layers == min(alone, key=alone.get)
    assert found.after.divergence == pytest.approx(min(alone.values())) and found.after.density > found.before.density


def test_errors_of_heads_are_those_of_their_outputs(model):
    """Leaving one head dense removes its own error, and an error is what attention's output loses."""
    text = Text(model, TEXT)
    full, errors = observe(model, text, LAYERS)
    assert errors.shape == (2, 2) and (errors > 1e-6).all()
    _, without = observe(model, text, (replace(SPARSITY, dense_heads=(1,)), SPARSITY))
    assert without[0, 1] == 0 and without[0, 0] == pytest.approx(errors[0, 0])
    assert without[1] == pytest.approx(errors[1])
    x, layer = text.embedded(model), model.layers[0]
    one_dense, _ = text.run(layer, x, replace(SPARSITY, dense_heads=(1,)))
    exact, _ = text.run(layer, x, Sparsity(budget=99))
    attended = []  # by attention, before the MLP
    for sparsity in (replace(SPARSITY, dense_heads=(1,)), Sparsity(budget=99)):
        normed = layer.attention_norm(x)
        q, k, v = layer.attention.project(normed, *text.rope)
        pages = Paged(k, v, text.length)
        dense = np.isin([0, 1], sparsity.dense_heads)
        selection = with_dense(pages.select(q, replace(sparsity, dense_heads=())), dense, text.length)
        attended.append(np.asarray(layer.attention.output(pages.attend(q, selection)))[0, : text.length])
    want = np.mean(np.square(attended[0] - attended[1]).sum(-1) / np.square(attended[1]).sum(-1))
    assert errors[0, 0] == pytest.approx(want, rel=1e-3)
    assert not np.allclose(one_dense, exact)
    want = np.asarray(model.logits(model.norm(full)))[0, : text.length]
    np.testing.assert_allclose(want, np.asarray(model(np.array([TEXT])))[0], atol=1e-4)


def test_an_interrupted_calibration_goes_on(model, any_help, tmp_path, monkeypatch):
    path, lines, measure, calls = tmp_path / "partial", [], SparseRun.measure, []

    def measured(run, layers, every):
        calls.append(layers)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(run, layers, every)

    monkeypatch.setattr(SparseRun, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, [TEXT], SPARSITY, Measured(path, "a"))
    found = calibrate(model, [TEXT], SPARSITY, again := Measured(path, "a", lines.append))
    assert "figures were measured before" in lines[0] and path.exists()
    again.finish()
    assert not path.exists()
    total = len(calls) - 1
    calls[:] = [None] * 4
    assert calibrate(model, [TEXT], SPARSITY).layers == found.layers and len(calls) - 4 == total, "none is done twice"
    assert Measured(path, "a").results == {}
    path.write_text(json.dumps({"subject": "b", "results": {"x": 1}}))
    assert Measured(path, "a").results == {}, "figures of another model"
    path.write_text("{")
    assert Measured(path, "a", lines.append)("x", lambda: 2) == 2 and "is damaged" in lines[-1]
    with pytest.raises(UserError, match="cannot write into .*nowhere: name another folder"):
        Measured(tmp_path / "nowhere" / "partial", "a")


def test_layers_that_need_it_attend_to_more(model, any_help, monkeypatch):
    monkeypatch.setattr(calibrate_sparsity, "MAX_DENSE", 0)
    monkeypatch.setattr(calibrate_sparsity, "MAX_BUDGET", 2)
    monkeypatch.setattr(calibrate_sparsity, "EVERY", 1)
    tried, measure = {}, SparseRun.measure

    def measured(run, layers, every):
        result = measure(run, layers, every)
        tried[tuple(layer.budget for layer in layers)] = result.divergence
        return result

    monkeypatch.setattr(SparseRun, "measure", measured)
    found = calibrate(model, [TEXT], SPARSITY)
    once = min([(1.0, 0.5), (0.5, 1.0)], key=tried.get)
    assert tried[once] < tried[0.5, 0.5] and tried[1.0, 1.0] < tried[once]
    assert list(tried)[0] == (0.5, 0.5) and set(list(tried)[1:3]) == {(1.0, 0.5), (0.5, 1.0)}
    assert list(tried)[3:] == [(1.0, 1.0)]
    for budgets, divergence in tried.items():  # a run that begins in the middle ends as a whole one
        layers = tuple(Sparsity(budget=budget) for budget in budgets)
        assert divergence == pytest.approx(fidelity(model, TEXT, layers, recall=False).divergence, rel=1e-3)
    assert tuple(layer.budget for layer in found.layers) == (1.0, 1.0)


def test_selectors_are_compared_at_the_same_density(model, tmp_path):
    points = list(compare(model, [TEXT], ["pyramid", "window", "oracle"], budgets=(0.5, 1.0)))
    assert [(point.selector, point.budget) for point in points] == [
        (name, budget) for name in ("pyramid", "window", "oracle") for budget in (0.5, 1.0)]
    for one, *others in (points[0::2], points[1::2]):
        assert {point.density for point in others} == {one.density} and {p.reachable for p in others} == {one.reachable}
        measured = fidelity(model, TEXT, (Sparsity(budget=one.budget),) * 2)  # of the same queries and keys
        assert one.density == pytest.approx(measured.density)
        assert one.recall == pytest.approx(measured.recall.recall.mean(), abs=1e-3)
        assert one.reachable == pytest.approx(measured.recall.reachable.mean(), abs=1e-3)
        assert one.found == pytest.approx(measured.recall.found.sum() / measured.recall.needed.sum(), abs=0.02)
        assert others[1].found >= one.found and others[0].recall != one.recall
    picture(points, tmp_path / "recall.png", "selectors")
    assert (tmp_path / "recall.png").stat().st_size > 5000


def test_what_adds_too_many_pages_is_left(model, any_help, monkeypatch):
    free = calibrate(model, [TEXT], SPARSITY)
    assert sum(len(layer.dense_heads) for layer in free.layers) == 1  # of four: a share of MAX_DENSE, rounded up
    assert {layer.budget for layer in free.layers} == {2.0} and free.after.density > free.before.density + 0.2
    monkeypatch.setattr(calibrate_sparsity, "MAX_ADDED", 0.15)
    some = calibrate(model, [TEXT], SPARSITY)
    assert some.before.density < some.after.density < some.before.density + 0.15
    monkeypatch.setattr(calibrate_sparsity, "MAX_ADDED", 0.0)
    one = calibrate(model, [TEXT], SPARSITY)
    assert sum(now != SPARSITY for now in one.layers) == 1, "the first change is always affordable"
    monkeypatch.setattr(calibrate_sparsity, "MIN_GAIN", 0.5)  # half of the divergence for each hundredth of density
    assert calibrate(model, [TEXT], SPARSITY).layers == LAYERS


def test_the_last_layers_rank_by_keys_where_others_estimate(model, monkeypatch):
    """Of two layers the last one; a given selector that is not `pyramid` stays in all."""
    monkeypatch.setattr(calibrate_sparsity, "CANDIDATES", 0)
    found = calibrate(model, [TEXT], Sparsity("pyramid", budget=0.5))
    assert [layer.selector for layer in found.layers] == ["pyramid", "reranked"]
    assert [layer.selector for layer in calibrate(model, [TEXT], Sparsity("quest", budget=0.5)).layers] == ["quest"] * 2


def test_short_texts_are_refused(model):
    with pytest.raises(UserError, match="the texts must be longer"):
        calibrate(model, [TEXT[:100]], SPARSITY)


def test_the_engine_reads_what_was_found(hf, tmp_path):
    hf.save_pretrained(tmp_path)
    config = resolve(tmp_path).config
    assert read_sparsity(tmp_path, config) is None
    layers = (Sparsity(budget=0.5, dense_heads=(1,)), Sparsity(budget=2, threshold=0.1))
    write_sparsity(tmp_path, layers, {"density": .5})
    stored = read_sparsity(tmp_path, config)
    assert stored == layers
    limits = Limits(max_batch_size=2, max_seq_len=512, prefill_shapes=((1, 64),), recompute_shapes=(), decode_rows=(2,))
    engine = Engine.from_pretrained(tmp_path, tokenizer=None, limits=limits, warmup=False,
                                    policy=SchedulePolicy(sparse_above_tokens=64))
    assert engine.sparsity == stored


@pytest.mark.parametrize("change", [{"dense_heads": [2]}, {"budget": -1}, {"dense_heads": 3}, {"colour": 1}, None])
def test_a_damaged_file_is_refused(hf, tmp_path, change):
    config = from_transformers(hf, "float32")[0]
    path = write_sparsity(tmp_path, LAYERS, {})
    first, second = json.loads(path.read_text())["layers"]
    path.write_text(json.dumps({"layers": [first | change, second] if change else [first]}))
    with pytest.raises(UserError, match="qwen-jax calibrate"):
        read_sparsity(tmp_path, config)


def test_mistakes_on_the_command_line_are_one_sentence(hf, tmp_path, capsys):
    hf.save_pretrained(tmp_path)
    assert main(["calibrate", str(tmp_path)]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    assert main(["eval", "yardstick", "--selector", "best"]) == 2
    assert "--selector must be one of dense, pyramid" in capsys.readouterr().err
