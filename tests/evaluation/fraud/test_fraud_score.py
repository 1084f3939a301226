"""Scores of hand-made answers."""
import numpy as np
import pytest
from bpe_tokenizer import train_tokenizer

from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud.accounts import PATTERNS
from qwen_jax.evaluation.fraud.score import answers_in_one_pass, score
from qwen_jax.evaluation.fraud.task import generate


def test_perfect_answers():
    examples = generate(0, "heldout", 32)
    result = score([e.answer for e in examples], examples)
    assert (result.accuracy, result.reason, result.majority) == (1.0, 1.0, 0.5)
    assert set(result.patterns) == set(PATTERNS)
    assert {(p.examples, p.fraud, p.twin, p.reason) for p in result.patterns.values()} == {(4, 1.0, 1.0, 1.0)}


def test_wrong_answers_are_counted_where_they_belong():
    examples = generate(0, "heldout", 16)  # one fraud and one twin of each pattern
    texts = [e.answer for e in examples]
    texts[0] = "legit R00"              # R01: a fraud missed
    texts[3] = "fraud R02 city"         # R02: a false alarm
    texts[4] = "fraud R01 device"       # R03: fraud, for a wrong reason
    texts[6] = ""                       # R04: no answer
    texts[8] = "fraudulent R05 amount"  # R05: no such label
    result = score(texts, examples)
    assert result.accuracy == pytest.approx(12 / 16) and result.reason == pytest.approx(11 / 16)
    parts = {name: (p.fraud, p.twin, p.reason) for name, p in result.patterns.items()}
    assert parts["R01"] == (0, 1, 0) and parts["R02"] == (1, 0, 1) and parts["R03"] == (1, 1, 0)
    assert parts["R04"] == (0, 1, 0) and parts["R05"] == (0, 1, 0) and parts["R06"] == (1, 1, 1)
    assert "accuracy 0.7500" in result.table() and PATTERNS["R03"] in result.table()


def test_majority_of_an_unbalanced_file():
    examples = generate(0, "heldout", 20)[::2] + generate(0, "heldout", 2)[1:]
    assert score(["fraud"] * 11, examples).majority == pytest.approx(10 / 11)


def test_a_missing_answer_is_refused():
    with pytest.raises(UserError, match="at least one, not 1 answers for 2 examples"):
        score(["legit R00"], generate(0, "heldout", 2))


def test_one_pass_reads_the_prediction_at_each_position_of_the_answer():
    """A stand-in model that knows the next token gives the right answers; a shifted model does not."""
    tokenizer = train_tokenizer(["fraud legit"], 280)
    examples = generate(3, "heldout", 10)

    def oracle(shift):
        def logits_of(tokens):
            assert tokens.shape[0] == 4 and tokens.shape[1] % 64 == 0
            return np.eye(tokenizer.get_vocab_size(), dtype=np.float32)[np.roll(tokens, -shift, axis=1)]
        return answers_in_one_pass(logits_of, tokenizer, examples, rows=4)

    assert oracle(1) == [e.answer for e in examples]
    assert oracle(2) != [e.answer for e in examples]
