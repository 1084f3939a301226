"""Measure what a LoRA adapter learns on a released model, and compare its training with PEFT's.

    python scripts/bench/lora_task.py MODEL [--parts task,fp8,speed] [--steps 60] [--held-out 60] [--rounds 2]

The task: an index entry for a Python function, from its first lines: its name, its number of arguments, the arguments
in alphabetical order, and the first line of its docstring, in a notation that the request explains. Functions are
those of Python's standard library; some modules are held out. An answer is right if it is the entry.

task, fp8: exact answers on held-out functions before training and after `qwen-jax train`, in float32 and with the base
model in 8 bits. PEFT loads the adapter and answers the same prompts.
speed: tokens per second of a training step, and the largest memory of the process, ours (with recompute of the layers
in the backward pass, and without) and PEFT's with torch, in alternating processes; float32, all seven matrices of a
layer, rank 16.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402
from workload import say  # noqa: E402

from qwen_jax import Engine, SamplingParams  # noqa: E402
from qwen_jax.checkpoint import load_params, resolve  # noqa: E402

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HELD_OUT = ("argparse", "calendar", "csv", "difflib", "fnmatch", "shutil", "statistics", "textwrap")
LENGTH, ROWS, RANK, ALPHA = 256, 2, 16, 32
REQUEST = ("Index entry: name/number of arguments <names of the arguments in alphabetical order> first line of the "
           "docstring in lower case without full stop.")
SIDES = ("ours", "recompute", "peft")
RECIPE = """
model = "{model}"
data = ["{data}"]
output = "{output}"
steps = {steps}
sequence_length = {length}
batch_size = {rows}
compute_dtype = "float32"
fp8 = {fp8}
on_bad = "skip"
[optimizer]
learning_rate = 5e-4
warmup_steps = 5
[lora]
rank = {rank}
alpha = {alpha}
targets = {targets}
"""


def examples() -> tuple[list[dict], list[dict]]:
    """Return conversations about functions of the standard library, to train on and held out, in a fixed order."""
    train, held_out = [], []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(errors="replace"))):
            if isinstance(node, ast.FunctionDef) and (entry := index_entry(node)):
                (held_out if path.stem in HELD_OUT else train).append(entry)
    order = np.random.default_rng(0)
    return [train[place] for place in order.permutation(len(train))], [
        held_out[place] for place in order.permutation(len(held_out))]


def index_entry(node: ast.FunctionDef) -> dict | None:
    """Return a conversation with a function's first lines and its index entry, or None if it is not suitable."""
    doc = (ast.get_docstring(node) or "").split("\n")[0].strip()
    names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    if not 8 <= len(doc) <= 70 or not 1 <= len(names) <= 6 or '"' in doc:
        return None
    head = f'def {node.name}({ast.unparse(node.args)}):\n    """{doc}"""'
    answer = f"{node.name}/{len(names)} <{' '.join(sorted(names))}> {doc.rstrip('.').lower()}"
    return {"messages": [{"role": "user", "content": f"{REQUEST}\n{head}"}, {"role": "assistant", "content": answer}]}


def score(model: str, held_out: list[dict], adapter: Path | None = None, **options) -> tuple[float, list[str]]:
    """Return the share of right answers of a model with an adapter, and the answers."""
    engine = Engine.from_pretrained(model, max_batch_size=8, max_seq_len=LENGTH, max_adapters=1, progress=False,
                                    max_adapter_rank=RANK, **options)
    if adapter:
        engine.load_adapter("index", adapter)
    prompts = [engine.input_processor.tokens(example["messages"][:1]) for example in held_out]
    outs = engine.generate(prompts, greedy(), **({"adapter": "index"} if adapter else {}))
    engine.close()
    return share_right([out.text for out in outs], held_out), [out.text for out in outs]


def greedy() -> SamplingParams:
    return SamplingParams(max_tokens=64, temperature=0.0, repetition_penalty=1.0)


def share_right(answers: list[str], held_out: list[dict]) -> float:
    return float(np.mean([answer.strip() == example["messages"][1]["content"]
                          for answer, example in zip(answers, held_out, strict=True)]))


def task(model: str, steps: int, count: int, fp8: bool, folder: Path) -> None:
    """Train an adapter by `qwen-jax train`; print the scores before and after, and PEFT's with the same adapter."""
    train, held_out = examples()
    held_out = held_out[:count]
    data, output = folder / "train.jsonl", folder / f"run-{fp8}"
    data.write_text("".join(json.dumps(example) + "\n" for example in train))
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(model=model, data=data, output=output, steps=steps, length=LENGTH, rows=ROWS,
                                    fp8=str(fp8).lower(), rank=RANK, alpha=ALPHA, targets=json.dumps(TARGETS)))
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "qwen_jax.cli", "train", str(recipe)], check=True)
    seconds = time.perf_counter() - began
    options = {"fp8_enabled": True, "kv_cache_dtype": None} if fp8 else {"dtype": "float32"}
    before, _ = score(model, held_out, **options)
    say(f"before: {before:.1%}")
    after, answers = score(model, held_out, output / "result", **options)
    print(f"{'8-bit base' if fp8 else 'float32'}, {steps} steps of {ROWS} x {LENGTH} tokens in {seconds:.0f} s, "
          f"{len(held_out)} held-out functions: {before:.1%} right before, {after:.1%} after", flush=True)
    if not fp8:
        theirs = peft_answers(model, output / "result", held_out[:10])
        print(f"PEFT with the adapter: {sum(map(str.__eq__, theirs, answers))} of {len(theirs)} answers are ours")


def peft_answers(model: str, adapter: Path, held_out: list[dict]) -> list[str]:
    """Return the greedy answers of transformers with an adapter that PEFT loads."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve(model).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    answers = []
    for example in held_out:
        prompt = tokenizer.apply_chat_template(example["messages"][:1], add_generation_prompt=True, return_dict=True,
                                               return_tensors="pt")
        out = adapted.generate(**prompt, max_new_tokens=64, do_sample=False, temperature=None, top_p=None, top_k=None,
                               repetition_penalty=1.0)
        answers.append(tokenizer.decode(out[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
    return answers


def speed(model: str, rounds: int) -> None:
    """Print tokens per second and memory of training by both sides, each in processes of its own, alternating."""
    results: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for round_ in range(rounds):
        for side, values in results.items():
            out = subprocess.run([sys.executable, __file__, model, "--side", side], check=True, capture_output=True,
                                 text=True).stdout
            values.append(tuple(map(float, out.split()[-2:])))
            say(f"round {round_} {side}: {values[-1][0]:.1f} tokens/s, {values[-1][1]:.2f} GB")
    rates, memory = ({side: statistics.median(value[place] for value in values) for side, values in results.items()}
                     for place in (0, 1))
    print(f"training, {ROWS} x {LENGTH} tokens, float32, rank {RANK}")
    for side in SIDES:
        print(f"{side:10} {rates[side]:6.1f} tokens/s ({rates[side] / rates['peft']:.2f}), {memory[side]:.2f} GB "
              f"({memory[side] / memory['peft']:.2f})", flush=True)


def side(name: str, model: str) -> None:
    """Time training steps of one side in this process; print tokens per second and the largest memory in GB."""
    step = peft_step(model) if name == "peft" else ours_step(model, name == "recompute")
    times = []
    for _ in range(5):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(ROWS * LENGTH / statistics.median(times[1:]), peak)


def random_tokens(vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (ROWS, LENGTH))


def ours_step(model: str, recompute: bool):
    """Return a function that runs a training step of this project, with recompute of the layers or without."""
    import jax
    from training import OPTIMIZER

    from qwen_jax.model.lora import LoraConfig, init_adapter
    from qwen_jax.training.batch import Batch
    from qwen_jax.training.stacked import stack
    from qwen_jax.training.step import init_state, language_model_loss, make_train_step

    source, lora = resolve(model), LoraConfig(RANK, float(ALPHA), TARGETS)
    config = source.config
    frozen = stack(load_params(source, config, "float32"), consume=True)
    tokens = random_tokens(config.vocab_size)
    batch = Batch(tokens.astype(np.int32), np.ones(tokens.shape, np.float32), np.zeros(tokens.shape, np.int32),
                  np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)))
    box = [init_state(init_adapter(config, lora), OPTIMIZER)]
    step = make_train_step(language_model_loss(config, lora=lora, recompute=recompute, compute_dtype="float32"),
                           OPTIMIZER)

    def run():
        box[0], metrics = step(box[0], frozen, batch)
        jax.block_until_ready((box[0], metrics))

    return run


def peft_step(model: str):
    """Return a function that runs a training step of PEFT and torch's AdamW."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count())
    base = AutoModelForCausalLM.from_pretrained(resolve(model).path, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), lora_dropout=0.0))
    adamw = torch.optim.AdamW([value for value in adapted.parameters() if value.requires_grad], lr=1e-4)
    tokens = torch.tensor(random_tokens(base.config.vocab_size))

    def run():
        adamw.zero_grad()
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
        adamw.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--parts", default="task,fp8,speed")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side(args.side, args.model)
        return
    parts = args.parts.split(",")
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            if part == "speed":
                speed(args.model, args.rounds)
            else:
                task(args.model, args.steps, args.held_out, part == "fp8", Path(folder))


if __name__ == "__main__":
    main()
