"""Models that are read from GGUF files, against gguf's own dequantisation, transformers, and the exported model."""

import json
import shutil

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from hf_folders import read_tensors
from oracle import hf_logits, random_qwen2

from qwen_jax import UserError
from qwen_jax.checkpoint import (
    convert,
    export,
    export_gguf,
    load_generation_config,
    load_model,
    load_params,
    load_tokenizer,
    resolve,
    save_hf,
)
from qwen_jax.checkpoint.gguf import unpack as unpack_module
from qwen_jax.checkpoint.source import SHIPPED, find_config
from qwen_jax.config import ModelConfig, Rope, Yarn
from qwen_jax.model import init

TOKENS = np.random.default_rng(0).integers(0, 320, (2, 40))
# What llama.cpp's quantiser uses, and more; gguf writes the first five, and of the others we make the blocks ourselves.
WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
SCALES = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210), "IQ4_XS": (0, 2)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("QWEN_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def encoded(weight, kind, random):
    """A matrix's bytes, rows by rows, in a type of ggml."""
    number = gguf.GGMLQuantizationType[kind]
    if kind in WRITTEN:
        return gguf.quantize(weight, number)
    size, nbytes = gguf.GGML_QUANT_SIZES[number]
    blocks = random.integers(0, 256, (len(weight), weight.shape[1] // size, nbytes), np.uint8)
    first, last = SCALES[kind]  # the blocks' float16 scales, in which random bytes would be NaN
    scale = (random.uniform(.0002, .002, (*blocks.shape[:2], (last - first) // 2))).astype(np.float16)
    blocks[..., first:last] = scale.view(np.uint8)
    return blocks.reshape(len(weight), -1)


def write(path, model, kinds, parts=1, skip=(), **facts):
    """Write a torch model as GGUF, with matrices of these types in turn; its matrices become what the file says."""
    config, random = model.config, np.random.default_rng(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    writers = [gguf.GGUFWriter(None, "qwen2") for _ in range(parts)]
    if parts > 1:
        for number, writer in enumerate(writers):
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
    keys = {"block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads}
    for key, value in keys.items():
        writers[0].add_uint32(f"qwen2.{key}", value)
    writers[0].add_rope_freq_base(1e6)
    writers[0].add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in facts.items():
        writers[0].add_string(key, value)
    matrices = 0
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if name in skip:
            continue
        writer, short = writers[number % parts], names.get_name(name, (".weight", ".bias"))
        if tensor.ndim == 1:
            writer.add_tensor(short, tensor.numpy())
            continue
        kind = kinds[matrices % len(kinds)]
        matrices += 1
        data = encoded(tensor.numpy(), kind, random)
        writer.add_tensor(short, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        tensor.copy_(torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind])))
    for number, writer in enumerate(writers):
        writer.write_header_to_file(path if parts == 1 else
                                    path.parent / f"{path.stem}-{number + 1:05d}-of-{parts:05d}.gguf")
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return model


@pytest.mark.parametrize("kinds", [[kind] for kind in WRITTEN] + [BLOCKS])
def test_logits_of_every_type(tmp_path, kinds):
    theirs = write(tmp_path / "x.gguf", random_qwen2(hidden_size=256, intermediate_size=256, num_attention_heads=4,
                                                     num_hidden_layers=1), kinds)
    ours = load_model(tmp_path / "x.gguf", "float32")(TOKENS)
    expected = hf_logits(theirs, TOKENS).numpy()
    assert np.abs(ours - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
@pytest.mark.parametrize("name", ["tied", "sharded"])
def test_what_was_exported_comes_back(shared, tmp_path, dtype, name):
    export_gguf(shared / name, tmp_path / "x.gguf", dtype)
    source, original = resolve(tmp_path / "x.gguf"), resolve(shared / name)
    assert source.kind == "gguf" and source.config.tie_word_embeddings == (name == "tied")
    assert (tmp_path / "x.gguf").stat().st_size == source.files.root.joinpath("0.gguf").stat().st_size
    found, expected = (load_params(place, place.config, "float32") for place in (source, original))
    for path, value in expected.items():
        want = np.asarray(value).astype(np.float16) if dtype != "bfloat16" and value.ndim > 1 else value
        np.testing.assert_array_equal(found[path], np.asarray(want, np.float32), err_msg=path)


def test_conversion_and_back_to_hugging_face(shared, tmp_path):
    export_gguf(shared / "sharded", tmp_path / "x.gguf", "bfloat16")
    with pytest.raises(UserError, match=r"x\.gguf is not converted: convert it first"):
        export(tmp_path / "x.gguf", tmp_path / "back")
    back = export(convert(tmp_path / "x.gguf", tmp_path / "orbax"), tmp_path / "back")
    for name, tensor in read_tensors(shared / "sharded").items():
        np.testing.assert_array_equal(read_tensors(back)[name].float(), tensor.float())
    assert find_config(tmp_path / "x.gguf")[1].endswith("(from GGUF)")


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    config = ModelConfig(vocab_size=960, hidden_size=64, intermediate_size=96, num_layers=1, num_heads=4,
                         num_kv_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=True,
                         rope=Rope(yarn=Yarn(4.0, 32)), bos_token_id=940, eos_token_id=942)
    folder = save_hf(init(config, seed=1), config, tmp_path_factory.mktemp("gguf") / "model",
                     tokenizer_files_from=SHIPPED["bundled"])
    export_gguf(folder, folder.parent / "x.gguf")
    return folder


def test_tokenizer_and_settings(with_tokenizer, tmp_path):
    source, original = resolve(with_tokenizer.parent / "x.gguf"), resolve(with_tokenizer)
    ours, theirs = load_tokenizer(source), load_tokenizer(original)
    text = "Payment of 12,500 USD?\n\n  don't <|im_start|>user\n\u4f60\u597d e\u0301 <|im_end|> \U0001f600"
    assert ours.encode(text) == theirs.encode(text) and len(ours) == len(theirs)
    for skip in (True, False):
        assert ours.decode(ours.encode(text), skip_special_tokens=skip) == theirs.decode(
            theirs.encode(text), skip_special_tokens=skip)
    talk = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(talk, add_generation_prompt=True) == theirs.apply_chat_template(
        talk, add_generation_prompt=True)
    assert (ours.eos_token, ours.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert load_generation_config(source).eos_token_ids == (942, 940)
    ours, theirs = source.config, original.config
    assert (ours.head_dim, ours.rope, ours.max_context, ours.bos_token_id, ours.eos_token_id) == (
        theirs.head_dim, theirs.rope, theirs.max_context, 940, 942)  # other heads than hidden / num_heads


def test_plain_text_is_split_as_transformers_reads_it(with_tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(SHIPPED["bundled"])
    text = "SEPA transfer, reference RF18 5390; it's 3.50\u20ac \u2014 or so\n"
    assert load_tokenizer(resolve(with_tokenizer.parent / "x.gguf")).encode(text) == theirs.encode(text)


def test_sampling_settings_of_the_file(tmp_path):
    facts = {"general.architecture": "qwen2", "general.sampling.temp": 0.7, "general.sampling.top_k": 20}
    assert unpack_module._generation(facts) == {"do_sample": True, "temperature": 0.7, "top_k": 20}


def test_a_file_is_parsed_once_and_anew_when_it_changes(shared, tmp_path, monkeypatch):
    parsed, open_ = [], unpack_module._open
    monkeypatch.setattr(unpack_module, "_open", lambda part: parsed.append(part) or open_(part))
    export_gguf(shared / "tied", tmp_path / "x.gguf")
    first = resolve(tmp_path / "x.gguf")
    assert resolve(tmp_path / "x.gguf") == first and len(parsed) == 1
    (tmp_path / "x.gguf").unlink()
    export_gguf(shared / "sharded", tmp_path / "x.gguf")
    assert resolve(tmp_path / "x.gguf") != first and len(parsed) == 2
    assert not resolve(tmp_path / "x.gguf").config.tie_word_embeddings


def test_a_cache_that_cannot_be_written(shared, tmp_path, monkeypatch, caplog):
    export_gguf(shared / "tied", tmp_path / "x.gguf")
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("QWEN_JAX_CACHE", str(tmp_path / "a file"))
    source = resolve(tmp_path / "x.gguf")
    assert "parsed at each start" in caplog.text and source.config.num_layers == 2
    load_model(source)


# --- several files

def test_a_model_in_parts(tmp_path):
    theirs = write(tmp_path / "x.gguf", random_qwen2(intermediate_size=96), ["Q8_0"], parts=3)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"x-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for ref in (parts[0], parts[2], tmp_path):
        np.testing.assert_allclose(load_model(ref, "float32")(TOKENS), hf_logits(theirs, TOKENS), atol=2e-4)
    parts[1].unlink()
    with pytest.raises(UserError, match=r"one of 3 parts, and x-00002-of-00003\.gguf is missing"):
        resolve(parts[0])


def test_a_folder_of_several_models(shared, tmp_path):
    for name in ("a", "b"):
        export_gguf(shared / "tied", tmp_path / f"{name}.gguf")
    with pytest.raises(UserError, match=r"several GGUF models: name one of a\.gguf, b\.gguf"):
        resolve(tmp_path)


def test_a_file_on_the_hub(shared, tmp_path, monkeypatch):
    files = ["README.md", "m-q4_k_m.gguf", "m-q4_0.gguf", "m-q8_0-00001-of-00002.gguf", "m-q8_0-00002-of-00002.gguf"]
    export_gguf(shared / "tied", tmp_path / "m-q4_0.gguf")
    asked = []
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda repo, allow_patterns: asked.append((repo, allow_patterns)) or str(tmp_path))
    assert resolve("Qwen/Model-GGUF:Q4_0").kind == "gguf"
    with pytest.raises(UserError, match="no model at Qwen/Model-GGUF:q8_0"):  # the stand-in has no such file
        resolve("Qwen/Model-GGUF:q8_0")
    assert asked == [("Qwen/Model-GGUF", files[2:3]), ("Qwen/Model-GGUF", files[3:])]
    with pytest.raises(UserError, match="no GGUF models called q2_k: name one of m-q4_0, m-q4_k_m, m-q8_0"):
        resolve("Qwen/Model-GGUF:q2_k")


# --- what is refused

def test_damaged_and_other_files(tmp_path, shared):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(UserError, match="not a GGUF file, or is damaged"):
        resolve(tmp_path / "x.gguf")
    export_gguf(shared / "tied", tmp_path / "y.gguf")
    whole = (tmp_path / "y.gguf").read_bytes()
    (tmp_path / "z.gguf").write_bytes(whole[:-2000])
    with pytest.raises(UserError, match="truncated inside|is damaged"):
        resolve(tmp_path / "z.gguf")
    nan = np.full(1000, np.nan, np.float16).tobytes()
    (tmp_path / "n.gguf").write_bytes(whole[:-len(nan)] + nan)
    with pytest.raises(UserError, match="holds NaN or Inf"):
        load_model(tmp_path / "n.gguf")
    source = resolve(tmp_path / "y.gguf")
    (tmp_path / "y.gguf").write_bytes(whole[:-2000])
    with pytest.raises(UserError, match="is truncated inside"):
        load_model(source)


def test_other_models_are_refused(tmp_path):
    model = random_qwen2(hidden_size=64, intermediate_size=96)
    for name, facts, said in (
            ("scaling", {"qwen2.rope.scaling.type": "linear"}, "extends its context by 'linear'"),
            ("words", {"tokenizer.ggml.model": "llama"}, "tokenizer in .* is of the kind 'llama'"),
            ("split", {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"}, "by the rule 'tekken'")):
        write(tmp_path / f"{name}.gguf", model, ["Q8_0"], **facts)
        with pytest.raises(UserError, match=said):
            resolve(tmp_path / f"{name}.gguf")
    write(tmp_path / "no_norm.gguf", model, ["Q8_0"], skip=("model.norm.weight",))
    with pytest.raises(UserError, match=r"1 missing: model\.norm\.weight"):
        load_model(tmp_path / "no_norm.gguf")
    write(tmp_path / "no_embedding.gguf", model, ["Q8_0"], skip=("model.embed_tokens.weight",))
    with pytest.raises(UserError, match="lacks token_embd.weight"):
        resolve(tmp_path / "no_embedding.gguf")
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    with pytest.raises(UserError, match="not a Qwen2.5 model: architecture llama"):
        resolve(tmp_path / "llama.gguf")


def test_a_type_that_gguf_does_not_dequantise(tmp_path, monkeypatch):
    write(tmp_path / "x.gguf", random_qwen2(hidden_size=64, intermediate_size=96), ["Q4_0"])

    def refuse(data, kind):
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(UserError, match="weights of the type .*, which are not read"):
        resolve(tmp_path / "x.gguf")


def test_files_beside_a_config_are_not_looked_at(shared, tmp_path):
    folder = shutil.copytree(shared / "tied", tmp_path / "model")
    (folder / "x.gguf").write_bytes(b"GGUF")
    assert resolve(folder).kind == "hf"
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == resolve(folder).config.num_layers
