"""``qwen-jax train``: a recipe in, a checkpoint or an adapter out."""
import json

import numpy as np
import pytest

from qwen_jax.checkpoint import load_model, load_tokenizer, resolve
from qwen_jax.checkpoint.adapters import load_adapter
from qwen_jax.cli import main
from qwen_jax.evaluation.fraud import generate
from qwen_jax.model import params_of

RECIPE = """
model = "bundled"
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
    """Conversations whose answers are new to the bundled model."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    with open(path, "w") as file:
        for example in generate(3, "train", 16):
            messages = [*example.messages, {"role": "assistant", "content": "legit legit legit"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def recipe(folder, data, extra=""):
    (folder / "recipe.toml").write_text(RECIPE.format(data=data, output=folder / "run") + extra)
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
    assert main(["train", path]) == 2
    assert "this run is finished" in capsys.readouterr().err


def test_the_whole_model(tmp_path, data, capsys):
    assert main(["train", recipe(tmp_path, data)]) == 0
    before, after = (params_of(load_model(ref, None)) for ref in ("bundled", tmp_path / "run" / "result"))
    assert all(after[path].dtype == value.dtype for path, value in before.items())
    assert all((np.asarray(after[path]) != np.asarray(value)).any() for path, value in before.items() if "w" in path)
    tokenizer = load_tokenizer(resolve(tmp_path / "run" / "result"))
    assert tokenizer.encode("fraud R01") == load_tokenizer(resolve("bundled")).encode("fraud R01")
    assert losses(tmp_path)[-1] < 0.05  # the new answer; before, each token of it costs several nats


@pytest.mark.parametrize("change, message", [
    (("sequence_length = 256", "sequence_length = 4096"), "exceeds the model's context of 2048"),
    (("sequence_length = 256", "sequence_length = 32"), "line 1: the conversation has"),
    (('model = "bundled"', 'model = "nowhere/at all"'), "nowhere/at all"),
    (("steps = 20", "step = 20"), "unknown key step"),
])
def test_what_cannot_work_is_one_line(tmp_path, data, capsys, change, message):
    path = recipe(tmp_path, data)
    (tmp_path / "recipe.toml").write_text((tmp_path / "recipe.toml").read_text().replace(*change))
    assert main(["train", path]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "run").exists()
