"""The shipped long-context model: small, loadable by transformers, and right about texts it has never seen."""
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_jax.checkpoint import resolve
from qwen_jax.cli import main
from qwen_jax.evaluation.longcontext.suite import found, sample

# Not learned: to list the commonest words without repeating one (docs/evaluation.md).
LEARNED = ("single_needle", "many_keys", "many_values", "many_queries", "variable_tracking", "account_history")
FOLDER = resolve("yardstick").path


def test_it_is_small_and_complete():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) <= 10_000_000
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["max_position_embeddings"] == 16384


def test_it_retrieves_through_the_engine(capsys, tmp_path):
    """The command line evaluates the model well, on samples of another seed."""
    arguments = ["eval", "yardstick", "--lengths", "512,1024", "--samples", "4", "--seed", "7", "--json", "--families",
                 ",".join(LEARNED), "--dtype", "float32", "--picture", str(tmp_path / "map.png")]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    cells = [json.loads(line) for line in out.splitlines()]
    assert [(cell["family"], cell["length"]) for cell in cells] == [(f, n) for n in (512, 1024) for f in LEARNED]
    assert sum(cell["right"] for cell in cells) / sum(cell["samples"] for cell in cells) >= 0.9, out
    assert (tmp_path / "map.png").stat().st_size > 5000 and "at 1,024:" in err


def test_transformers_says_the_same():
    theirs, tokenizer = (kind.from_pretrained(FOLDER) for kind in (AutoModelForCausalLM, AutoTokenizer))
    scores = []
    for index in range(6):
        one = sample("many_keys", f"theirs.{index}", 1024, tokenizer)
        ids = torch.tensor([one.prompt])
        out = theirs.float().generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        scores.append(found(tokenizer.decode(out[0, ids.shape[1]:].tolist()), one.expected))
    assert sum(scores) >= 5


@pytest.mark.parametrize("change, message", [
    (["--lengths", "4k"], "--lengths must be numbers of tokens"), (["--families", "needle"], "unknown family needle"),
    (["--lengths", "0"], "a length must be a positive integer, not 0"),
    (["--lengths", "99999"], "exceeds the model's context"), (["--picture", "map.jpg"], "whose name ends in .png"),
    (["--samples", "0"], "samples must be a positive integer, not 0")])
def test_what_cannot_be_run_is_one_line(capsys, change, message):
    assert main(["eval", "yardstick", "--lengths", "512", "--dtype", "float32", *change]) == 2
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1]
