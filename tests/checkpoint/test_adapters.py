"""LoRA adapters compared with peft: peft loads ours, we load peft's, and the logits agree."""
import dataclasses
import json
import os

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from oracle import torch_model
from safetensors.numpy import load_file, save_file

from qwen_jax.checkpoint.adapters import _READ_OR_FREE, load_adapter, save_adapter
from qwen_jax.config import ModelConfig, Rope
from qwen_jax.errors import UserError
from qwen_jax.model import build, init, params_of
from qwen_jax.model.lora import TARGETS, LoraConfig, adapt_site, init_adapter, merge_adapter, num_parameters

CONFIG = ModelConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=6, num_kv_heads=2,
                     head_dim=8, max_position_embeddings=256, rope=Rope(10_000.0), dtype="float32")
LORA = LoraConfig(4, 12.0, TARGETS)
TOKENS = np.random.default_rng(0).integers(0, 320, (2, 20)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return {path: np.asarray(value) for path, value in params_of(init(CONFIG, 0, "float32")).items()}


def random_adapter(lora=LORA):
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(0.3 * rng.normal(size=value.shape), jnp.float32)
            for name, value in init_adapter(CONFIG, lora).items()}


def adapted_logits(params, lora, adapter):
    from qwen_kernels.attention import causal_attention

    model = build(CONFIG, params)

    def adapt(layer, site, x, y):
        return adapt_site(CONFIG, {name: value[layer] for name, value in adapter.items()}, lora.scale,
                          site=site, x=x, y=y)

    positions = np.tile(np.arange(TOKENS.shape[1]), (len(TOKENS), 1))
    return model.logits(model.hidden(TOKENS, positions, lambda _, q, k, v: causal_attention(q, k, v), adapt))


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj",), ("v_proj", "k_proj"), ("o_proj", "gate_proj"),
                                     ("down_proj",)])
def test_ours_loads_in_peft(tmp_path, params, targets):
    lora = LoraConfig(4, 12.0, targets)
    adapter = random_adapter(lora)
    save_adapter(adapter, CONFIG, lora, tmp_path / "a", base_model="base")
    model = peft.PeftModel.from_pretrained(torch_model(CONFIG, params), tmp_path / "a")
    ours = np.asarray(adapted_logits(params, lora, adapter))
    np.testing.assert_allclose(ours, theirs(model), atol=2e-4)
    plain = np.asarray(build(CONFIG, params)(TOKENS))
    assert np.abs(ours - plain).max() > 0.05, "the adapter does something"
    np.testing.assert_allclose(np.asarray(build(CONFIG, merge_adapter(CONFIG, params, adapter, lora))(TOKENS)), ours,
                               atol=2e-4)


@pytest.mark.parametrize("options", [
    {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": "all-linear"},
    {"target_modules": r".*\.self_attn\.(q|o)_proj"}, {"target_modules": ["k_proj", "up_proj"], "use_rslora": True},
])
def test_peft_s_loads_here(tmp_path, params, options):
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(torch_model(CONFIG, params), settings)
    model.save_pretrained(tmp_path / "a")
    lora, adapter = load_adapter(tmp_path / "a", CONFIG)
    np.testing.assert_allclose(np.asarray(adapted_logits(params, lora, adapter)), theirs(model), atol=2e-4)
    assert sum(value.size for value in adapter.values()) == num_parameters(CONFIG, lora)


def trained(init, params, rank=2):
    """A model with an adapter that begins as PEFT's initialisation says, before and after what stands for training."""
    settings = peft.LoraConfig(r=rank, lora_alpha=3, init_lora_weights=init, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(torch_model(CONFIG, params), settings)
    yield model
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value += 0.3 * torch.randn_like(value)
    yield model


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_of_a_changed_base_model_is_refused_and_its_conversion_is_right(tmp_path, params, init):
    torch.manual_seed(0)
    steps = trained(init, params)
    model = next(steps)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's documentation of the conversion says
    model.save_pretrained(tmp_path / "begin")
    model.peft_config["default"].init_lora_weights = init
    next(steps)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match=f"uses init_lora_weights='{init}', .* path_initial_model"):
        load_adapter(tmp_path / "plain", CONFIG)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "begin"))
    lora, adapter = load_adapter(tmp_path / "converted", CONFIG)
    np.testing.assert_allclose(np.asarray(adapted_logits(params, lora, adapter)), theirs(model), atol=5e-4)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "mica", "eva"])
def test_other_initial_values_leave_the_base_model_as_it_is(tmp_path, params, init):
    torch.manual_seed(0)
    *_, model = trained(init, params)
    model.save_pretrained(tmp_path / "a")
    lora, adapter = load_adapter(tmp_path / "a", CONFIG)
    np.testing.assert_allclose(np.asarray(adapted_logits(params, lora, adapter)), theirs(model), atol=2e-4)


def test_every_setting_of_peft_is_known_or_must_be_absent(tmp_path):
    """A setting of a later version is refused as long as it is not known to change nothing."""
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    for name in sorted(known - _READ_OR_FREE | {"of_a_later_version"}):
        with pytest.raises(UserError, match=f"uses {name}="):
            load_adapter(broken(tmp_path / name, settings={name: {"x": 1}}), CONFIG)


def test_there_and_back_is_bit_identical(tmp_path):
    adapter = random_adapter()
    save_adapter(adapter, CONFIG, LORA, tmp_path / "a")
    lora, again = load_adapter(tmp_path / "a", CONFIG)
    assert lora == LORA and again.keys() == adapter.keys()
    for name, value in adapter.items():
        np.testing.assert_array_equal(value, again[name])


def test_a_new_adapter_changes_nothing_and_starts_like_peft_s(params):
    lora, adapter = LORA, init_adapter(CONFIG, LORA, 0)
    np.testing.assert_array_equal(adapted_logits(params, lora, adapter), build(CONFIG, params)(TOKENS))
    torch.manual_seed(0)
    model = peft.get_peft_model(torch_model(CONFIG, params), peft.LoraConfig(r=4, target_modules=["down_proj"]))
    a = np.concatenate([p.detach().numpy().ravel() for n, p in model.named_parameters() if "lora_A" in n])
    assert np.abs(adapter["down_proj.a"]).max() <= CONFIG.intermediate_size ** -0.5 >= np.abs(a).max() * (1 - 1e-6)
    assert np.std(adapter["down_proj.a"]) == pytest.approx(a.std(), rel=0.1)


def test_rank_16_on_attention_of_7b_is_10_million():
    config = ModelConfig.preset("qwen2.5-7b")
    assert num_parameters(config, LoraConfig(16, 32.0, ("q_proj", "k_proj", "v_proj", "o_proj"))) == 10_092_544


def test_rows_with_adapters_of_their_own(params):
    """A product for a batch whose rows use different adapters equals the products of the rows alone."""
    rng = np.random.default_rng(3)
    adapters = [random_adapter(), {name: value * 2 for name, value in random_adapter().items()}]
    scales = np.array([1.5, 0.5], np.float32)
    sizes = {"qkv": (32, (2, 3, 2, 5, 8)), "o": (48, (2, 3, 32)), "gate_up": (32, (2, 2, 3, 48)),
             "down": (48, (2, 3, 32))}
    for site, (inputs, outputs) in sizes.items():
        x, y = rng.normal(size=(2, 3, inputs)).astype(np.float32), rng.normal(size=outputs).astype(np.float32)
        rows = (slice(None),) if site == "gate_up" else ()  # axes of y before that of the rows
        both = {name: jnp.stack([adapter[name][1] for adapter in adapters]) for name in adapters[0]}
        found = adapt_site(CONFIG, both, scales, site=site, x=x, y=y)
        for row, (adapter, scale) in enumerate(zip(adapters, scales, strict=True)):
            own, mine = {name: value[1] for name, value in adapter.items()}, (*rows, slice(row, row + 1))
            alone = adapt_site(CONFIG, own, scale, site=site, x=x[row:row + 1], y=y[mine])
            np.testing.assert_allclose(found[mine], alone, atol=1e-5)


def broken(folder, settings=None, tensors=None):
    """Save an adapter with some settings or tensors changed; None removes a setting or a tensor."""
    save_adapter(random_adapter(), CONFIG, LORA, folder)
    for file, changes in (("adapter_config.json", settings), ("adapter_model.safetensors", tensors)):
        if changes:
            old = json.loads((folder / file).read_text()) if settings else load_file(folder / file)
            new = {key: value for key, value in {**old, **changes}.items() if value is not None}
            (folder / file).write_text(json.dumps(new)) if settings else save_file(new, folder / file)
    return folder


NAME = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize("changes, message", [
    ({"settings": {"peft_type": "PREFIX_TUNING"}}, "holds a PREFIX_TUNING adapter: only LORA"),
    ({"settings": {"use_dora": True}}, "uses use_dora=True, which is not implemented"),
    *(({"settings": {"init_lora_weights": init}}, f"uses init_lora_weights='{init}'")
      for init in ("corda", "loftq", "lora_ga", "PiSSA", "of_a_later_version")),
    ({"settings": {"arrow_config": {"top_k": 3}}}, "uses arrow_config="),
    ({"settings": {"use_qalora": True, "qalora_group_size": 8}}, "uses use_qalora=True"),
    ({"settings": {"bias": "all"}}, "uses bias='all'"),
    ({"settings": {"rank_pattern": {"q_proj": 8}}}, "uses rank_pattern="),
    ({"settings": {"target_modules": ["q_proj", "lm_head"]}}, "an adapter's targets must be of .*, not lm_head"),
    ({"settings": {"r": 0}}, "rank of an adapter must be a positive integer, not 0"),
    ({"settings": {"r": 8}}, r"does not fit this model: it has .* as \[4, 32\], should be \[8, 32\]"),
    ({"settings": {"lora_alpha": "x"}}, "r and lora_alpha must be numbers"),
    ({"settings": {"lora_alpha": 1e300}}, "r and lora_alpha must be at most 16777216, not 4 and 1e.300"),
    ({"settings": {"lora_alpha": float("inf")}}, "r and lora_alpha must be at most"),
    ({"settings": {"lora_alpha": float("nan")}}, "alpha of an adapter must be a positive number"),
    ({"settings": {"r": 10**400}}, "r and lora_alpha must be at most"),
    ({"settings": {"r": -4, "use_rslora": True}}, "rank of an adapter must be a positive integer, not -4"),
    ({"settings": {"target_modules": 5}}, "target_modules must be a list of names or a pattern, not 5"),
    ({"settings": {"target_modules": "[("}}, "target_modules must be a pattern that can be matched, not '"),
    ({"settings": {"target_modules": r"(\w|\.|[a-z])+\d\d"}}, "a pattern that can be matched, not .*timed out"),
    ({"tensors": {NAME: None}}, f"lacks {NAME}"),
    ({"tensors": {"extra": np.zeros(1, np.float32)}}, "has an unexpected extra"),
    ({"tensors": {NAME: np.zeros((4, 47), np.float32)}}, r"as \[4, 47\], should be \[4, 48\]"),
    ({"tensors": {NAME: np.full((4, 48), np.nan, np.float32)}}, f"{NAME}"),
])
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_adapter(broken(tmp_path / "a", **changes), CONFIG)


def test_an_adapter_of_another_architecture_is_refused(tmp_path):
    other = ModelConfig(**{**vars(CONFIG), "num_layers": 3})
    with pytest.raises(UserError, match="lacks base_model.model.model.layers.2"):
        load_adapter(broken(tmp_path / "a"), other)


def test_a_file_that_is_no_settings_or_no_file_is_refused(tmp_path):
    folder = broken(tmp_path / "a")
    for text in (b"\xff", b"[" * 100_000, b"[]"):
        (folder / "adapter_config.json").write_bytes(text)
        with pytest.raises(UserError, match="is not"):
            load_adapter(folder, CONFIG)
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")  # who reads a pipe waits for ever
    with pytest.raises(UserError, match="it has no adapter_config.json"):
        load_adapter(folder, CONFIG)
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        load_adapter("x" * 5000, CONFIG)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a PEFT adapter: it has no adapter_config.json"):
        load_adapter(tmp_path, CONFIG)
    save_adapter(random_adapter(), CONFIG, LORA, tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(UserError, match="cannot read"):
        load_adapter(tmp_path / "a", CONFIG)
    with pytest.raises(UserError, match="exists"):
        save_adapter(random_adapter(), CONFIG, LORA, tmp_path / "a")
