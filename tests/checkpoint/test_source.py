"""Models found by reference, other references refused with a reason; tokenizers and generation defaults."""

import json
import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import qwen_jax.checkpoint.source as source_module
from qwen_jax.checkpoint import convert, export, load_generation_config, load_model, load_tokenizer, resolve
from qwen_jax.checkpoint.source import SHIPPED, Source
from qwen_jax.errors import UserError

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json"):
        load_model(folder)


@pytest.mark.parametrize(("changes", "named"), [
    ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM"),
    ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
])
def test_other_architectures_and_quantised_weights_are_named(folder, changes, named):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=named):
        resolve(folder)


def test_config_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        resolve(folder)


def test_weights_in_other_formats_are_named(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        load_model(folder)
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pytorch_model.bin .* save them as safetensors"):
        load_model(folder)
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="name the GGUF file itself"):
        load_model(folder)


def test_quantisation_beside_the_config_is_named(folder):
    (folder / "quantize_config.json").write_text("{}")
    with pytest.raises(UserError, match="GPTQ weights of None bits"):
        resolve(folder)
    (folder / "quantize_config.json").write_text("[]")
    with pytest.raises(UserError, match="quantize_config.json is not a JSON object"):
        resolve(folder)


def test_references_that_are_not_models(folder, tmp_path, monkeypatch):
    for ref in (tmp_path / "nowhere", "nowhere", "a/b/c"):
        with pytest.raises(UserError, match="no model at"):
            resolve(ref)
    with pytest.raises(UserError, match="is a file: give the folder"):
        resolve(folder / "model.safetensors")
    monkeypatch.setitem(source_module.SHIPPED, "bundled", tmp_path / "absent")
    with pytest.raises(UserError, match="no model at bundled"):
        resolve("bundled")
    monkeypatch.setitem(source_module.SHIPPED, "bundled", folder)
    assert resolve("bundled") == ("hf", folder)


def test_newer_checkpoint_format_is_refused(shared, tmp_path):
    convert(shared / "tied", tmp_path / "orbax")
    manifest = tmp_path / "orbax" / "qwen_jax.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 99}))
    for use in (load_model, lambda path: export(path, tmp_path / "back")):
        with pytest.raises(UserError, match="checkpoint format 99"):
            use(tmp_path / "orbax")


class Hub:
    """A stand-in for the hub: a single repository, and a log of the files that were requested."""

    def __init__(self, monkeypatch, folder=None, error=None):
        self.folder, self.error, self.asked = folder, error, []
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.one)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.all)

    def one(self, repo, name):
        self.asked.append(name)
        if self.error:
            raise self.error
        return str(self.folder / name)

    def all(self, repo, allow_patterns):
        self.asked.append("weights")
        return str(self.folder)


def test_hub_id_is_downloaded(folder, monkeypatch):
    hub = Hub(monkeypatch, folder)
    assert resolve("Qwen/Qwen2.5-0.5B-Instruct").path == folder
    assert hub.asked == ["config.json", "weights"]


def test_hub_model_that_cannot_be_used_costs_no_download(folder, monkeypatch):
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes"})
    hub = Hub(monkeypatch, folder)
    with pytest.raises(UserError, match="bitsandbytes"):
        resolve("Qwen/Qwen2.5-7B-Instruct-bnb-4bit")
    assert hub.asked == ["config.json"]


@pytest.mark.parametrize(("error", "said"), [
    (EntryNotFoundError("404 Client Error\nEntry Not Found", None), "as GGUF releases have none"),
    (LocalEntryNotFoundError("cannot reach the hub\nand more"), "could it be downloaded: cannot reach the hub"),
    (OSError("proxy says no"), "proxy says no"),
])
def test_hub_trouble_is_one_line(monkeypatch, error, said):
    Hub(monkeypatch, error=error)
    with pytest.raises(UserError, match=said) as caught:
        resolve("Qwen/Qwen2.5-0.5B")
    assert "\n" not in str(caught.value)


def test_tokenizer_travels_with_the_weights(shared, tmp_path):
    shutil.copytree(shared / "tied", tmp_path / "hf")
    assert load_tokenizer(resolve(tmp_path / "hf")) is None
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator(["pay 12 euro"], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", chat_template=CHATML).save_pretrained(
        tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back")
    for name in ("hf", "orbax", "back"):
        tokenizer = load_tokenizer(resolve(tmp_path / name))
        assert tokenizer.decode(tokenizer.encode("pay 99 € später")) == "pay 99 € später"
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert chat == "<|im_start|>user\nhi<|im_end|>\n"
    (tmp_path / "back" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer .* cannot be read"):
        load_tokenizer(resolve(tmp_path / "back"))


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize("change", [
    {}, {"pre_tokenizer": BYTES}, {"pre_tokenizer": {**BYTES, "add_prefix_space": True}},
    {"normalizer": None}, {"normalizer": {"type": "Lowercase"}}, {"normalizer": {"type": "NFKC"}},
    {"decoder": {"type": "Sequence", "decoders": [BYTES, {"type": "Replace", "pattern": {"String": "e"},
                                                           "content": "E"}]}},
    {"model": {"ignore_merges": True}}, {"model": {"merges": []}},
])
def test_a_tokenizer_is_that_of_its_file(tmp_path, change):
    """Transformers' class for Qwen2 has rules of its own to normalise, split and decode text."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SHIPPED["bundled"] / name, tmp_path / name)
    facts = json.loads((tmp_path / "tokenizer.json").read_text())
    model = {**facts["model"], **change.get("model", {})}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**facts, **change, "model": model}))
    ours, theirs = load_tokenizer(Source("hf", tmp_path)), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "It's THE payment of 12345 €, später:\n\n  ﬁve e\u0301<|im_end|> merchants' cards"
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, add_special_tokens=False) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    for token in ("eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(ours, token) == getattr(load_tokenizer(resolve("bundled")), token)


def test_generation_defaults(shared, tmp_path):
    defaults = load_generation_config(resolve(shared / "sharded"))
    assert defaults.eos_token_ids == (7, 8) and defaults.top_k == 20
    convert(shared / "sharded", tmp_path / "orbax")
    assert load_generation_config(resolve(tmp_path / "orbax")) == defaults
    (tmp_path / "orbax" / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        load_generation_config(resolve(tmp_path / "orbax"))
