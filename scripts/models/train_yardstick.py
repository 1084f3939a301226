"""Train the long-context yardstick model and write its Hugging Face folder.

    python scripts/models/train_yardstick.py [configs/train/yardstick.toml] [--run runs/yardstick] [--out FOLDER]

Run again with the same folder, it continues after an interruption. About twice as fast with jemalloc:
    LD_PRELOAD=libjemalloc.so.2 MALLOC_CONF=dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always python scripts/...
"""
import argparse
import random
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from bpe_tokenizer import END_OF_TEXT, train_tokenizer
from model_folder import model_config, write_folder
from model_recipes import Stage, YardstickRecipe
from qwen_kernels.attention import causal_attention
from retrieval_init import prepare_for_retrieval
from tokenizers import Tokenizer
from turn_rows import OPENING, encode, put

from qwen_jax.checkpoint.load import load_params
from qwen_jax.checkpoint.source import resolve
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud.accounts import DAYS
from qwen_jax.evaluation.fraud.names import pieces
from qwen_jax.evaluation.longcontext import words
from qwen_jax.evaluation.longcontext.samples import FAMILIES, draw
from qwen_jax.evaluation.longcontext.tasks import Document
from qwen_jax.model import init, params_of
from qwen_jax.training.batch import Batch, empty
from qwen_jax.training.curves import plot_curves
from qwen_jax.training.loop import Run, fit
from qwen_jax.training.recipe import load_recipe
from qwen_jax.training.stacked import hidden, stack, unstack
from qwen_jax.training.step import init_state, language_model_loss, make_optimizer, make_train_step

# Family -> how often it is drawn, most questions about a document, tokens that a question takes (approximately).
MATERIAL = {"single_needle": (1, 6, 22), "many_keys": (1, 12, 22), "many_values": (3, 4, 46),
            "many_queries": (1, 4, 54), "variable_tracking": (1, 4, 34), "common_words": (5, 6, 40),
            "frequent_words": (5, 4, 40), "account_history": (3, 8, 66)}
SKIPS = 4           # number of places in an opening where positions may be left out
UNSKIPPED = .25     # fraction of rows that leave out no position


def build_tokenizer(recipe: YardstickRecipe) -> Tokenizer:
    """Train a tokenizer that knows every word of the long-context tasks, and the pieces of made-up names."""
    known = [word for group in vars(words).values() if isinstance(group, list) for phrase in group
             for word in phrase.split()]
    phrases = []
    for family in FAMILIES:
        for seed in range(20):
            document = draw(family, seed, 2000, lambda document: len(document.text))
            question, = document.questions
            phrases += [part.strip() for part in (document.text.split("\n")[0], *question[:3])]
    return train_tokenizer([*(f" {word}" for word in [*known, *DAYS, "near", "paid"]), *words.PEOPLE, *DAYS,
                            *pieces()] * 10 + phrases, recipe.vocab_size)


def run_tokenizer(recipe: YardstickRecipe, run: Path) -> Tokenizer:
    """Return a training run's tokenizer: the saved one of a continued run, the start model's, or a new one."""
    run.mkdir(parents=True, exist_ok=True)
    file = run / "tokenizer.json"
    if not file.exists():
        if recipe.start_from:
            shutil.copy(resolve(recipe.start_from).path / "tokenizer.json", file)
        else:
            build_tokenizer(recipe).save(str(file))
    return Tokenizer.from_file(str(file))


class Material:
    """Random training rows: a row is a document of a task family, followed by questions about it and their answers."""

    def __init__(self, recipe: YardstickRecipe, tokenizer: Tokenizer):
        self.recipe, self.tokenizer = recipe, tokenizer

    def count_tokens(self, document: Document) -> int:
        return len(self.tokenizer.encode(document.text).ids)

    def row(self, rng: random.Random, family: str, length: int, reach: int) -> dict[str, list]:
        """Draw a row of at most `length` tokens, whose positions may skip ahead up to `reach`; return its fields."""
        _, max_questions, per_question = MATERIAL[family]
        questions = max(1, min(max_questions, length // 2 // per_question))
        if family == "single_needle":
            questions = rng.randint(1, questions)
        room = length - 16 - questions * per_question
        try:
            document = draw(family, rng.random(), room, self.count_tokens, questions)
        except UserError:  # the row is too short for this family
            return self.row(rng, "common_words", length, reach)
        lines, skips = document.text.count("\n") + 1, {}
        if rng.random() >= UNSKIPPED and reach > length:
            left_out = rng.randrange(reach - length)
            cuts = sorted(rng.randint(0, left_out) for _ in range(SKIPS - 1))
            for start, stop in zip([0, *cuts], [*cuts, left_out]):
                line = rng.randint(1, lines)
                skips[line] = skips.get(line, 0) + stop - start
        return encode(self.tokenizer, f"<|im_start|>user\n{document.text}\n", turns(document), self.recipe.lm_weight,
                      skips)

    def batch(self, seed: str, families: Sequence[str], length: int, reach: int) -> Batch:
        """Draw a batch of training rows, one for each of the task families in `families`."""
        rng = random.Random(seed)
        batch = empty(len(families), length, self.tokenizer.token_to_id(END_OF_TEXT))
        for index, family in enumerate(families):
            put(batch, index, self.row(rng, family, length, reach))
        return batch

    def of_step(self, step: int) -> Batch:
        """Draw the training batch of a step, counted from 1."""
        stage = stage_of(self.recipe.stages, step)
        families = random.Random(f"{self.recipe.seed} families {step}").choices(
            list(MATERIAL), [often for often, _, _ in MATERIAL.values()], k=stage.rows)
        return self.batch(f"{self.recipe.seed} train {step}", families, stage.length, self.recipe.reach)


def initial_params(recipe: YardstickRecipe, config: ModelConfig) -> Mapping[str, jax.Array]:
    """Return float32 parameters to begin with: those of the recipe's start model, or new, prepared for retrieval."""
    if recipe.start_from:
        return load_params(resolve(recipe.start_from), config, "float32")
    params = prepare_for_retrieval(params_of(init(config, recipe.seed, "float32")), config, recipe.seed, recipe.reach)
    return {path: jnp.asarray(value) for path, value in params.items()}


def turns(document: Document) -> list[tuple[str, str]]:
    """Return the document's questions as pairs (rest of the user's message, answer)."""
    return [(question.text, question.prefix + question.answer) for question in document.questions]


def stage_of(stages: Sequence[Stage], step: int) -> Stage:
    """Return the stage of the training run that a step, counted from 1, belongs to."""
    for stage in stages:
        if step <= stage.steps:
            return stage
        step -= stage.steps
    raise ValueError("past the last stage")


def scale_queries(params: Mapping[str, jax.Array], config: ModelConfig, scale: float) -> dict[str, jax.Array]:
    """Return parameters in which `scale` multiplies the projections of queries, and so all attention scores."""
    return {path: value.at[:, :config.group_size].multiply(scale) if path.endswith((".wqkv", ".bqkv")) else value
            for path, value in params.items()}


def right_answers(batch: Batch, predicted: np.ndarray) -> list[bool]:
    """Return, for each question of one row, whether the model's predicted tokens are the right answer, in any order.

    predicted: most likely next token at each position, given the right answer up to there. It has to be among the
    tokens that the answer still lacks, since several answers may be right in any order. Answer tokens weigh 1.
    """
    result = []
    for segment in range(OPENING + 1, int(batch.segment_ids.max()) + 1):
        places = np.flatnonzero((batch.segment_ids == segment) & (batch.weights == 1))
        rest = Counter(batch.tokens[places].tolist())
        right = len(places) > 0
        for place in places:
            right &= rest[int(predicted[place - 1])] > 0
            rest[int(batch.tokens[place])] -= 1
        result.append(bool(right))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="configs/train/yardstick.toml")
    parser.add_argument("--run", type=Path, default=Path("runs/yardstick"), help="checkpoints and metrics")
    parser.add_argument("--out", type=Path, help="the finished Hugging Face folder; default: model in the run's folder")
    args = parser.parse_args()
    out = args.out or args.run / "model"
    if out.exists():
        raise UserError(f"{out} exists: move it away, or name another folder with --out")
    recipe = load_recipe(args.recipe, YardstickRecipe)
    tokenizer = run_tokenizer(recipe, args.run)
    config = model_config(recipe.model, tokenizer)
    initial = initial_params(recipe, config)
    print(f"{config.num_parameters:,} parameters, vocabulary {config.vocab_size}")
    material = Material(recipe, tokenizer)

    held_out = {length: [material.batch(f"held out {length} {family} {i}", [family], length, length)
                         for family in FAMILIES for i in range(2)] for length in recipe.evaluate_lengths}

    @jax.jit
    def predict(trainable, batch):
        states, model = hidden(config, trainable, batch.tokens, batch.positions, lambda q, k, v: causal_attention(
            q, k, v, segment_ids=batch.segment_ids, shared_segment=OPENING))
        return jnp.argmax(jnp.einsum("btd,vd->btv", states, model.head_weight), axis=-1)

    def evaluate(state) -> dict[str, float]:
        scores = {}
        for length, batches in held_out.items():
            for index, family in enumerate(FAMILIES):
                right = []
                for batch in batches[2 * index:2 * index + 2]:
                    row = Batch(*(field[0] for field in batch))
                    right += right_answers(row, np.asarray(predict(state.trainable, batch))[0])
                scores[f"{family}@{length}"] = sum(right) / len(right)
        return {"accuracy": float(np.mean(list(scores.values()))), **scores}

    steps = sum(stage.steps for stage in recipe.stages)
    optimizer = make_optimizer(recipe.optimizer, steps)
    step = make_train_step(language_model_loss(config, shared_segment=OPENING), optimizer)
    state = init_state(stack(initial), optimizer)
    run = Run(folder=args.run, steps=steps, checkpoint_every=recipe.evaluate_every, keep=1, max_skipped=10,
              facts=msgspec.to_builtins(recipe))
    trained = unstack(fit(state, step, {}, material.of_step, run=run, evaluate=evaluate).trainable)
    plot_curves(args.run / "metrics.jsonl", args.run / "curves.png")
    sharpened = scale_queries(trained, config, recipe.query_scale)
    write_folder({path: value.astype(jnp.bfloat16) for path, value in sharpened.items()}, config, tokenizer, out)
    print(out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
