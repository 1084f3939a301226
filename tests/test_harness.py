"""The engine under lm-evaluation-harness, against the harness' own transformers model."""
import json

import numpy as np
import pytest
from bpe_tokenizer import save_tokenizer, train_tokenizer
from oracle import random_qwen2
from transformers import AutoTokenizer

from qwen_jax import Engine
from qwen_jax.errors import UserError

lm_eval = pytest.importorskip("lm_eval")
TEXTS = [f"{a} {b} is {c} and the {b} was {a}." for a in ("red", "old", "big") for b in ("fox", "cat") for c in "xyz"]
LENGTH = 96


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Return (ours, the harness' own) model around the same random weights and tokenizer."""
    from lm_eval.models.huggingface import HFLM

    from qwen_jax.harness import QwenJaxLM

    folder = tmp_path_factory.mktemp("harness")
    tokenizer = train_tokenizer(TEXTS, 300)
    save_tokenizer(tokenizer, folder, 1024)
    model = random_qwen2(3, vocab_size=tokenizer.get_vocab_size())
    model.save_pretrained(folder)
    engine = Engine.from_pretrained(folder, dtype="float32", max_batch_size=4, max_seq_len=LENGTH, progress=False)
    theirs = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), max_length=LENGTH - 2,
                  device="cpu", batch_size=1)
    return QwenJaxLM(engine), theirs


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=values, idx=i) for i, values in enumerate(arguments)]


def test_loglikelihoods_are_those_of_the_harness_own_model(sides):
    long = " ".join(TEXTS)  # loses its beginning
    requests = instances("loglikelihood", [("the red fox is", " x"), ("", "old cat"), ("the old cat was ", "old."),
                                           (long, " red fox"), ("big", " fox is z and the fox was big.")])
    ours, theirs = (side.loglikelihood(requests, disable_tqdm=True) for side in sides)
    np.testing.assert_allclose([score for score, _ in ours], [score for score, _ in theirs], atol=2e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    ids = sides[1].model.generate(sides[1].tokenizer("the red fox", return_tensors="pt").input_ids, max_new_tokens=3,
                                  do_sample=False)[0, -3:]
    said = [((), sides[0].tok_encode("the red fox"), ids.tolist())]  # by construction the greedy continuation
    assert sides[0]._loglikelihood_tokens(said)[0][1] is True


def test_rolling_loglikelihoods_of_texts_longer_than_the_window(sides):
    requests = instances("loglikelihood_rolling", [(TEXTS[0],), (" ".join(2 * TEXTS),)])
    ours = sides[0].loglikelihood_rolling(requests, disable_tqdm=True)
    theirs = [float(x) for x in sides[1].loglikelihood_rolling(requests, disable_tqdm=True)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert len(sides[0].tok_encode(" ".join(2 * TEXTS))) > 3 * LENGTH


def test_generation_stops_where_theirs_does(sides):
    requests = instances("generate_until", [("the red fox", {"until": ["."], "max_gen_toks": 12}),
                                            ("old cat", {"until": [], "max_gen_toks": 8, "do_sample": False})])
    ours, theirs = (side.generate_until(requests, disable_tqdm=True) for side in sides)
    assert ours == theirs
    with pytest.raises(UserError, match="unknown generation option num_beams"):
        sides[0].generate_until(instances("generate_until", [("a", {"num_beams": 2})]))
    with pytest.raises(UserError, match="max_gen_toks must be less than max_seq_len=96, not 1000"):
        sides[0].generate_until(instances("generate_until", [("a", {"max_gen_toks": 1000})]))


def test_a_whole_task(sides, tmp_path):
    """A multiple-choice task from a local file: both models choose alike."""
    rows = [{"question": text.split(" is ")[0] + " is", "choices": [" x", " y", " z"], "answer": index % 3}
            for index, text in enumerate(TEXTS)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "local_choice", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "task.jsonl")}, "cache_dir": str(tmp_path)},
            "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
            "target_delimiter": "", "metric_list": [{"metric": "acc"}]}
    ours, theirs = (lm_eval.simple_evaluate(model=side, tasks=[task], bootstrap_iters=0)["results"]["local_choice"]
                    for side in sides)
    assert ours["acc,none"] == theirs["acc,none"]
