"""Measure training steps: LoRA against full fine-tuning, recompute of activations against none, ours against torch's.

    python scripts/bench/training.py [--parts memory,lora,torch] [--rounds 3]

memory: XLA's analysis of the compiled step, 0.5B shape with all 24 layers, for a small and a large batch; nothing is
run. On CPU it overstates what bf16 activations take: XLA:CPU keeps float32 copies of them.
lora: tokens per second of a LoRA step (rank 16 on q, k, v, o) and of a full one, 0.5B shape, alternating.
torch: the same full step in float32 by transformers and torch's AdamW, 0.5B shape cut to a few layers, alternating.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from qwen_jax import ModelConfig  # noqa: E402
from qwen_jax.model import abstract, init, params_of  # noqa: E402
from qwen_jax.model.lora import LoraConfig, init_adapter  # noqa: E402
from qwen_jax.training.batch import Batch  # noqa: E402
from qwen_jax.training.recipe import Optimizer  # noqa: E402
from qwen_jax.training.stacked import stack  # noqa: E402
from qwen_jax.training.step import init_state, language_model_loss, make_optimizer, make_train_step  # noqa: E402

LORA = LoraConfig(16, 32.0, ("q_proj", "k_proj", "v_proj", "o_proj"))
OPTIMIZER = make_optimizer(Optimizer(learning_rate=1e-4, weight_decay=0.1), 1000)


def batch(config: ModelConfig, rows: int, length: int) -> Batch:
    """Return a training batch of random tokens, every one of which counts in the loss."""
    rng = np.random.default_rng(0)
    tokens, positions = rng.integers(0, config.vocab_size, (rows, length)), np.tile(np.arange(length), (rows, 1))
    return Batch(tokens.astype(np.int32), np.ones((rows, length), np.float32), np.zeros((rows, length), np.int32),
                 positions.astype(np.int32))


def memory(rows: int, length: int) -> None:
    """Print XLA's analysis of the memory of training steps, full and LoRA, each with recompute and without."""
    config = ModelConfig.preset("qwen2.5-0.5b")
    arrays = {path: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for path, spec in abstract(config).items()}
    params = jax.eval_shape(stack, arrays)
    frozen = {path: jax.ShapeDtypeStruct(value.shape, jnp.bfloat16) for path, value in params.items()}
    adapter = jax.eval_shape(lambda: init_adapter(config, LORA))
    rows_of = jax.eval_shape(lambda: batch(config, rows, length))
    print(f"\nXLA's memory analysis, qwen2.5-0.5b, {rows} rows of {length} tokens, bf16 activations (MB)")
    print(f"{'':24} {'arguments':>10} {'temporary':>10} {'sum':>10}")
    sums, temporary = {}, {}
    for name, lora, recompute in (("full", None, False), ("full, recompute", None, True), ("LoRA", LORA, False),
                                  ("LoRA, recompute", LORA, True)):
        loss = language_model_loss(config, lora=lora, recompute=recompute, compute_dtype="bfloat16")
        state = jax.eval_shape(lambda t: init_state(t, OPTIMIZER), adapter if lora else params)
        compiled = make_train_step(loss, OPTIMIZER).lower(state, frozen if lora else {}, rows_of).compile()
        analysis = compiled.memory_analysis()
        sums[name] = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        temporary[name] = analysis.temp_size_in_bytes
        columns = analysis.argument_size_in_bytes, temporary[name], sums[name]
        print(f"{name:24} " + " ".join(f"{value / 1e6:10.0f}" for value in columns), flush=True)
    print(f"LoRA / full: {sums['LoRA'] / sums['full']:.2f}; both with recompute: "
          f"{sums['LoRA, recompute'] / sums['full, recompute']:.2f}; temporary memory, recompute / without: "
          f"full {temporary['full, recompute'] / temporary['full']:.2f}, "
          f"LoRA {temporary['LoRA, recompute'] / temporary['LoRA']:.2f}")


def alternate(steps: dict, tokens: int, rounds: int, title: str) -> None:
    """Time two kinds of training step in alternation, after a warm-up; print tokens per second and their ratio."""
    times = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if round_:
                times[name].append(time.perf_counter() - began)
            print(f"  round {round_} {name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    rates = {name: tokens / statistics.median(values) for name, values in times.items()}
    first, second = rates
    print(f"\n{title}\n" + "  ".join(f"{name} {rate:.1f} tokens/s" for name, rate in rates.items()) +
          f"  ratio {rates[first] / rates[second]:.2f}", flush=True)


def runner(config: ModelConfig, lora: LoraConfig | None, rows: int, length: int, dtype: str):
    """Return a function that runs a training step of this project: of LoRA, or a full one if `lora` is None."""
    params = stack(params_of(init(config, 0, "float32")))
    frozen = {path: value.astype(dtype) for path, value in params.items()} if lora else {}
    box = [init_state(init_adapter(config, lora) if lora else params, OPTIMIZER)]
    step = make_train_step(language_model_loss(config, lora=lora, compute_dtype=dtype), OPTIMIZER)
    data = batch(config, rows, length)

    def run():
        box[0], metrics = step(box[0], frozen, data)
        jax.block_until_ready((box[0], metrics))

    return run


def torch_runner(config: ModelConfig, rows: int, length: int):
    """Return a function that runs a full training step of transformers and torch's AdamW."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(os.cpu_count())
    settings = {key: value for key, value in config.to_hf().items() if key not in ("architectures", "model_type")}
    model = Qwen2ForCausalLM(Qwen2Config(**settings)).float()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    tokens = torch.tensor(batch(config, rows, length).tokens.astype(np.int64))

    def run():
        adamw.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="memory,lora,torch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4, help="layers of the model that torch trains too")
    args = parser.parse_args()
    parts, config = args.parts.split(","), ModelConfig.preset("qwen2.5-0.5b")
    if "memory" in parts:
        for rows, length in ((4, 512), (8, 1024)):
            memory(rows, length)
    if "lora" in parts:
        sides = {name: runner(config, lora, 1, 256, "float32") for name, lora in (("LoRA", LORA), ("full", None))}
        alternate(sides, 256, args.rounds, "LoRA against full fine-tuning, qwen2.5-0.5b, float32, 256 tokens")
        del sides
    if "torch" in parts:
        small = replace(config, num_layers=args.layers)
        sides = {"ours": runner(small, None, 2, 256, "float32"), "torch": torch_runner(small, 2, 256)}
        alternate(sides, 512, args.rounds, f"full step, qwen2.5-0.5b cut to {args.layers} layers, float32, 2 x 256")


if __name__ == "__main__":
    main()
