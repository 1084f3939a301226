"""GGUF files, read back with gguf's own reader: tensors, architecture, tokenizer, and what is refused."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGUFReader, TokenType, dequantize
from hf_folders import hf_model, read_tensors, rewrite, siblings

from qwen_jax.checkpoint import convert, export_gguf, load_params, resolve, save_hf
from qwen_jax.checkpoint.source import SHIPPED
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.model import init

NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
         "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def llama_cpp_name(name):
    for theirs, short in NAMES.items():
        name = name.replace(theirs, short)
    return name


def read(path):
    """Return metadata by key, and name -> (type, stored array)."""
    reader = GGUFReader(path)
    return ({key: field.contents() for key, field in reader.fields.items()},
            {tensor.name: (tensor.tensor_type.name, tensor.data) for tensor in reader.tensors})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of 64 hidden channels with the bundled tokenizer, and 17 more vocabulary rows than it has tokens."""
    config = ModelConfig(vocab_size=960, hidden_size=64, intermediate_size=96, num_layers=1, num_heads=4,
                         num_kv_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True,
                         bos_token_id=940)
    return save_hf(init(config, seed=1), config, tmp_path_factory.mktemp("gguf") / "model",
                   tokenizer_files_from=SHIPPED["bundled"])


@pytest.fixture
def with_tokenizer(model, tmp_path):
    """A private copy of the model."""
    return shutil.copytree(model, tmp_path / "model")


@pytest.mark.parametrize("name", ["tied", "sharded"])
@pytest.mark.parametrize("converted", [False, True])
def test_every_tensor_is_the_source_rounded_to_float16(shared, tmp_path, name, converted):
    src = shared / name
    if converted:
        src = convert(src, tmp_path / "orbax")
    export_gguf(src, tmp_path / "out" / "model.gguf")
    _, tensors = read(tmp_path / "out" / "model.gguf")
    source = {llama_cpp_name(name): tensor for name, tensor in read_tensors(shared / name).items()}
    assert tensors.keys() == source.keys() and ("output.weight" in source) == (name == "sharded")
    assert "blk.1.attn_k.bias" in source
    for name, tensor in source.items():
        kind, stored = tensors[name]
        assert kind == ("F32" if tensor.ndim == 1 else "F16"), name
        dtype = torch.float32 if tensor.ndim == 1 else torch.float16
        np.testing.assert_array_equal(stored, tensor.to(dtype).numpy(), err_msg=name)
    assert siblings(tmp_path / "out" / "model.gguf") == ["model.gguf"]


def test_architecture(shared, tmp_path):
    export_gguf(shared / "tied", tmp_path / "model.gguf")
    facts, _ = read(tmp_path / "model.gguf")
    assert facts["general.architecture"] == "qwen2" and facts["general.name"] == "tied"
    assert facts["general.file_type"] == 1  # llama.cpp's number for mostly F16
    assert {key.removeprefix("qwen2."): value for key, value in facts.items() if key.startswith("qwen2.")} == {
        "block_count": 2, "context_length": 256, "embedding_length": 48, "feed_forward_length": 80,
        "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 8, "attention.value_length": 8,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6), "rope.dimension_count": 8,
        "rope.freq_base": 10_000, "vocab_size": 320}
    assert facts["tokenizer.ggml.model"] == "none"  # the folder has no tokenizer


def test_bfloat16_keeps_every_bit(shared, tmp_path):
    export_gguf(shared / "sharded", tmp_path / "model.gguf", "bfloat16")
    facts, tensors = read(tmp_path / "model.gguf")
    assert facts["general.file_type"] == 32
    for name, tensor in read_tensors(shared / "sharded").items():
        kind, stored = tensors[llama_cpp_name(name)]
        if tensor.ndim == 2:
            assert kind == "BF16"
            stored = np.ascontiguousarray(stored).view(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(stored, tensor.float().numpy(), err_msg=name)


def test_q8_0_is_near_and_rows_that_do_not_divide_stay_float16(shared, with_tokenizer, tmp_path):
    export_gguf(with_tokenizer, tmp_path / "blocks.gguf", "q8_0")
    facts, tensors = read(tmp_path / "blocks.gguf")
    assert facts["general.file_type"] == 7
    for name, tensor in read_tensors(with_tokenizer).items():
        kind, stored = tensors[llama_cpp_name(name)]
        if tensor.ndim == 1:
            assert kind == "F32"
            continue
        assert kind == "Q8_0"
        blocks = tensor.float().numpy().reshape(-1, 32)
        error = np.abs(dequantize(stored, 8).reshape(-1, 32) - blocks)
        assert np.all(error <= np.abs(blocks).max(axis=1, keepdims=True) / 127 * 0.57), name
    export_gguf(shared / "tied", tmp_path / "odd.gguf", "q8_0")
    assert {kind for kind, _ in read(tmp_path / "odd.gguf")[1].values()} == {"F16", "F32"}


def test_tokenizer(with_tokenizer, tmp_path):
    export_gguf(with_tokenizer, tmp_path / "model.gguf")
    facts, _ = read(tmp_path / "model.gguf")
    facts = {key.removeprefix("tokenizer.ggml."): value for key, value in facts.items()}
    source = json.loads((with_tokenizer / "tokenizer.json").read_text())
    assert (facts["model"], facts["pre"]) == ("gpt2", "qwen2")
    assert facts["tokens"][:940] == list(source["model"]["vocab"])
    assert facts["tokens"][940:944] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[PAD943]"]
    assert facts["token_type"] == [TokenType.NORMAL] * 940 + [TokenType.CONTROL] * 3 + [TokenType.UNUSED] * 17
    assert facts["merges"] == [" ".join(pair) for pair in source["model"]["merges"]]
    assert (facts["bos_token_id"], facts["eos_token_id"], facts["padding_token_id"]) == (940, 942, 940)
    assert facts["add_bos_token"] is False
    assert facts["tokenizer.chat_template"] == json.loads(
        (with_tokenizer / "tokenizer_config.json").read_text())["chat_template"]


def change(path, edit):
    facts = json.loads(path.read_text())
    edit(facts)
    path.write_text(json.dumps(facts))


def test_older_tokenizer_files_have_merges_as_strings_and_the_oldest_their_own_file(with_tokenizer, tmp_path):
    merges = [" ".join(pair) for pair in json.loads((with_tokenizer / "tokenizer.json").read_text())["model"]["merges"]]
    change(with_tokenizer / "tokenizer.json", lambda facts: facts["model"].update(merges=merges))
    export_gguf(with_tokenizer, tmp_path / "strings.gguf")
    facts, _ = read(tmp_path / "strings.gguf")
    assert facts["tokenizer.ggml.merges"] == merges
    vocab = json.loads((with_tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    (with_tokenizer / "tokenizer.json").unlink()
    (with_tokenizer / "vocab.json").write_text(json.dumps(vocab))
    (with_tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    export_gguf(with_tokenizer, tmp_path / "files.gguf")
    old, _ = read(tmp_path / "files.gguf")
    assert {key: old[key] for key in facts if key.startswith("tokenizer.ggml.t")} == {
        key: facts[key] for key in facts if key.startswith("tokenizer.ggml.t")}
    assert old["tokenizer.ggml.merges"] == merges and old["tokenizer.ggml.pre"] == "qwen2"


def test_a_split_that_llama_cpp_does_not_know_is_named_nowhere_and_warned_about(with_tokenizer, tmp_path, caplog):
    export_gguf(with_tokenizer, tmp_path / "known.gguf")
    assert not caplog.records

    def three_digits(facts):
        split = facts["pre_tokenizer"]["pretokenizers"][0]["pattern"]
        split["Regex"] = split["Regex"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")

    change(with_tokenizer / "tokenizer.json", three_digits)
    export_gguf(with_tokenizer, tmp_path / "unknown.gguf")
    assert "tokenizer.ggml.pre" not in read(tmp_path / "unknown.gguf")[0]
    assert "llama.cpp does not know" in caplog.text


def test_a_normalizer_that_llama_cpp_does_not_have_is_warned_about(with_tokenizer, tmp_path, caplog):
    change(with_tokenizer / "tokenizer.json", lambda facts: facts.update(normalizer={"type": "Lowercase"}))
    export_gguf(with_tokenizer, tmp_path / "unknown.gguf")
    assert "llama.cpp does not know" in caplog.text


def test_another_kind_of_tokenizer_is_refused(with_tokenizer, tmp_path):
    change(with_tokenizer / "tokenizer.json", lambda facts: facts.update(decoder={"type": "Metaspace"}))
    with pytest.raises(UserError, match="not byte-level BPE"):
        export_gguf(with_tokenizer, tmp_path / "model.gguf")


def test_a_tokenizer_larger_than_the_model_is_refused(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SHIPPED["bundled"] / name, folder / name)
    with pytest.raises(UserError, match="has token 942, and the model 320"):
        export_gguf(folder, tmp_path / "model.gguf")


def test_heads_that_do_not_make_up_the_hidden_size_need_another_architecture(tmp_path):
    """llama.cpp's qwen2 cannot load them; seed_oss names its second norm differently and is otherwise the same."""
    export_gguf("bundled", tmp_path / "model.gguf")
    facts, tensors = read(tmp_path / "model.gguf")
    assert facts["general.architecture"] == "seed_oss" and facts["seed_oss.attention.key_length"] == 64
    source = {llama_cpp_name(name).replace("ffn_norm", "post_attention_norm"): tensor
              for name, tensor in read_tensors(SHIPPED["bundled"]).items()}
    assert tensors.keys() == source.keys()
    for name in ("blk.3.attn_output.weight", "blk.3.attn_q.weight"):
        np.testing.assert_array_equal(tensors[name][1], source[name].half().numpy())


def test_yarn_is_carried_over_or_refused(folder, tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    change(folder / "config.json", lambda facts: facts.update(rope_parameters=yarn))
    export_gguf(folder, tmp_path / "model.gguf")
    facts, _ = read(tmp_path / "model.gguf")
    assert (facts["qwen2.rope.scaling.type"], facts["qwen2.rope.scaling.factor"]) == ("yarn", 4)
    assert facts["qwen2.rope.scaling.original_context_length"] == 64
    change(folder / "config.json", lambda facts: facts.update(rope_parameters={**yarn, "attention_factor": 1.5}))
    with pytest.raises(UserError, match="YaRN"):
        export_gguf(folder, tmp_path / "other.gguf")


def test_fp8_checkpoints_are_written_as_what_they_stand_for(tmp_path):
    hf_model(layers=3).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "fp8", fp8=True)
    export_gguf(tmp_path / "fp8", tmp_path / "model.gguf")
    source = resolve(tmp_path / "fp8")
    expected = np.asarray(load_params(source, source.config)["layers.1.mlp.down"]).astype(np.float16)
    np.testing.assert_array_equal(read(tmp_path / "model.gguf")[1]["blk.1.ffn_down.weight"][1], expected)
    assert not np.array_equal(read_tensors(tmp_path / "hf")["model.layers.1.mlp.down_proj.weight"].half(), expected)


def test_an_existing_file_is_left_alone(shared, tmp_path):
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        export_gguf(shared / "tied", tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine" and siblings(tmp_path / "model.gguf") == ["model.gguf"]


def test_weights_beyond_float16_are_named_and_nothing_is_left(folder, tmp_path):
    rewrite(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(1e5))
    with pytest.raises(UserError, match="model.layers.1.mlp.up_proj.weight .* float16"):
        export_gguf(folder, tmp_path / "out" / "model.gguf")
    assert siblings(tmp_path / "out" / "model.gguf") == []
    export_gguf(folder, tmp_path / "out" / "model.gguf", "bfloat16")


def test_a_damaged_checkpoint_is_refused(shared, tmp_path):
    convert(shared / "tied", tmp_path / "orbax")
    change(tmp_path / "orbax" / "qwen_jax.json",
           lambda facts: facts["tensors"]["model.norm.weight"].update(sha256="0" * 64))
    with pytest.raises(UserError, match="differs from its SHA-256"):
        export_gguf(tmp_path / "orbax", tmp_path / "model.gguf")


def test_unknown_dtypes_are_refused(shared, tmp_path):
    with pytest.raises(UserError, match="'q4_k': use float16, bfloat16, q8_0"):
        export_gguf(shared / "tied", tmp_path / "model.gguf", "q4_k")
