"""``qwen-jax train``: a recipe in, a checkpoint or an adapter out."""
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from qwen_jax.checkpoint import load_model, load_tokenizer, resolve
from qwen_jax.checkpoint.adapters import load_adapter
from qwen_jax.checkpoint.source import SHIPPED, read_json
from qwen_jax.cli import main
from qwen_jax.evaluation.fraud.task import generate
from qwen_jax.model import build, params_of

RECIPE = """
model = "{model}"
data = ["{data}"]
output = "{output}"
steps = 20
sequence_length = 256
batch_size = 2
accumulate = 2
compute_dtype = "float32"
recompute = true

[optimizer]
learning_rate = 3e-3
warmup_steps = 2
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a file of conversations whose answers are new to the bundled model."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    with open(path, "w") as file:
        for example in generate(3, "train", 16):
            messages = [*example.messages, {"role": "assistant", "content": "legit legit legit"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The bundled model with the settings of a base model: it ends texts, and not turns, with its EOS."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(SHIPPED["bundled"], folder)
    for name, value in (("config.json", 940), ("generation_config.json", 940),
                        ("tokenizer_config.json", "<|endoftext|>")):
        field = "eos_token" if name == "tokenizer_config.json" else "eos_token_id"
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), field: value}))
    return folder


def recipe(folder, data, extra="", top="", model="bundled"):
    text = RECIPE.format(data=data, output=folder / "run", model=model)
    (folder / "recipe.toml").write_text(top + text + extra)
    return str(folder / "recipe.toml")


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_an_adapter(tmp_path, data, capsys):
    path = recipe(tmp_path, data, "[lora]\nrank = 4\nalpha = 8\n")
    assert main(["train", path]) == 0
    out, err = capsys.readouterr()
    result = tmp_path / "run" / "result"
    assert out.strip() == str(result) and "of 9" in err and "parameters are trained, on 16 examples" in err
    lora, adapter = load_adapter(result, resolve("bundled").config)
    assert (lora.rank, lora.alpha) == (4, 8) and np.abs(adapter["q_proj.b"]).max() > 1e-3
    assert losses(tmp_path)[-1] < 0.7 * losses(tmp_path)[0]  # of the 20th and the 10th step
    assert (tmp_path / "run" / "curves.png").stat().st_size > 5000
    assert "ends its turns" not in err and main(["train", path]) == 2
    assert "this run is finished" in capsys.readouterr().err


def test_an_adapter_over_eight_bits(tmp_path, data, base, capsys):
    path = recipe(tmp_path, data, "[lora]\nrank = 4\nalpha = 8\n", top="fp8 = true", model=base)
    assert main(["train", path]) == 0
    assert "the adapter ends its turns with token 942" in capsys.readouterr().err
    assert losses(tmp_path)[-1] < 0.7 * losses(tmp_path)[0]
    assert np.abs(load_adapter(tmp_path / "run" / "result", resolve("bundled").config)[1]["q_proj.b"]).max() > 1e-3


def test_the_whole_model(tmp_path, data, base):
    """A base model, which learns to end its turns."""
    assert main(["train", recipe(tmp_path, data, model=base)]) == 0
    before, after = (params_of(load_model(ref, None)) for ref in ("bundled", tmp_path / "run" / "result"))
    assert all(after[path].dtype == value.dtype for path, value in before.items())
    assert all((np.asarray(after[path]) != np.asarray(value)).any() for path, value in before.items() if "w" in path)
    tokenizer = load_tokenizer(resolve(tmp_path / "run" / "result"))
    assert tokenizer.encode("fraud R01") == load_tokenizer(resolve("bundled")).encode("fraud R01")
    kept, written = (read_json(folder / "generation_config.json") for folder in (base, tmp_path / "run" / "result"))
    assert written == {**kept, "eos_token_id": [942, 940]}
    assert losses(tmp_path)[-1] < 0.05  # the new answer; before, each token of it costs several nats


def test_a_student_of_some_layers(tmp_path, capsys):
    """The student is made of some of the teacher's layers and learns to say what the teacher says."""
    tokenizer = load_tokenizer(resolve("bundled"))
    texts = [tokenizer.apply_chat_template([*example.messages, {"role": "assistant", "content": example.answer}],
                                           tokenize=False) for example in generate(3, "train", 16)]
    whole = tmp_path / "texts.jsonl"
    whole.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    path = recipe(tmp_path, whole, "[distill]\nlayers = [0, 1, 3]\ntemperature = 1.5\nkl_weight = 1.0\n")
    assert main(["train", path]) == 0
    result = tmp_path / "run" / "result"
    assert resolve(result).config.num_layers == 3 and "are kept with recompute = true" in capsys.readouterr().err
    tokens = np.array([tokenizer.encode(texts[0])])
    teacher = params_of(load_model("bundled", "float32"))
    untrained = {path.replace("layers.3.", "layers.2."): value for path, value in teacher.items()
                 if not path.startswith("layers.2.")}
    wanted, before, after = (jax.nn.log_softmax(model(tokens)[0]) for model in (
        load_model("bundled", "float32"), build(resolve(result).config, untrained), load_model(result, "float32")))
    divergence = [float((jnp.exp(wanted) * (wanted - said)).sum(-1).mean()) for said in (before, after)]
    assert divergence[1] < 0.5 * divergence[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(result, dtype="float32")
    with torch.no_grad():
        np.testing.assert_allclose(np.asarray(load_model(result, "float32")(tokens)),
                                   theirs(torch.tensor(tokens)).logits.numpy(), atol=2e-4)


@pytest.mark.parametrize("extra, message", [
    ("[distill]\nlayers = [0, 4]\n", "layers must name some of the model's layers, 0 to 3, once each, not [0, 4]"),
    ("[distill]\ntemperature = 0.5\n", "needs a teacher, or the layers"),
    ("[distill]\nlayers = [0]\n[lora]\n", "[lora] or [distill], not both"),
    ('[distill]\nteacher = "{other}"\n', "different vocabularies"),
    ("[devices]\ndata = 2\ntensor = 1\n", "batch_size / accumulate must be a multiple of [devices] data=2, not 1"),
    ("[devices]\ntensor = 64\n", "needs 64 devices, and there are"),
])
def test_what_does_not_fit_together(tmp_path, data, capsys, extra, message):
    other = shutil.copytree(resolve("bundled").path, tmp_path / "other")
    tokenizer = (other / "tokenizer.json").read_text()
    assert '"!":' in tokenizer  # a token of another name
    (other / "tokenizer.json").write_text(tokenizer.replace('"!":', '"\u00a1\u00a1":'))
    assert main(["train", recipe(tmp_path, data, extra.replace("{other}", str(other)))]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("extra, message", [
    ("[lora]\n[devices]\n", "fp8 = true with [lora] runs on one device"),
    ("[distill]\nlayers = [0, 3]\n", "of 2 layers the first and the last stay as they are")])
def test_where_eight_bits_cannot_be(tmp_path, data, capsys, extra, message):
    assert main(["train", recipe(tmp_path, data, extra, top="fp8 = true")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    (("sequence_length = 256", "sequence_length = 4096"), "exceeds the model's context of 2048"),
    (("sequence_length = 256", "sequence_length = 32"), "line 1: the conversation has"),
    (('model = "bundled"', 'model = "nowhere/at all"'), "nowhere/at all"),
    (("steps = 20", "step = 20"), "unknown key step"),
    (("warmup_steps = 2", "warmup_steps = 20"), "warmup_steps must be less than steps, not 20 of 20"),
])
def test_what_cannot_work_is_one_line(tmp_path, data, capsys, change, message):
    path = recipe(tmp_path, data)
    (tmp_path / "recipe.toml").write_text((tmp_path / "recipe.toml").read_text().replace(*change))
    assert main(["train", path]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "run").exists()
