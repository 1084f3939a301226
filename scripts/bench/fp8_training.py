"""Train the yardstick model in FP8 and in bf16 on the same batches; compare the losses and the skipped steps.

    python scripts/bench/fp8_training.py               # the whole recipe, twice
    python scripts/bench/fp8_training.py --shrink 10   # a tenth of the steps of every stage
"""
import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import jax  # noqa: E402
import msgspec  # noqa: E402
import numpy as np  # noqa: E402
from model_folder import model_config  # noqa: E402
from model_recipes import YardstickRecipe  # noqa: E402
from train_yardstick import FAMILIES, Material, initial_params, run_tokenizer  # noqa: E402
from turn_rows import OPENING  # noqa: E402

from qwen_jax.quantization import default_precision  # noqa: E402
from qwen_jax.training.recipe import load_recipe  # noqa: E402
from qwen_jax.training.stacked import stack  # noqa: E402
from qwen_jax.training.step import init_state, language_model_loss, make_optimizer, make_train_step  # noqa: E402

HELD_OUT = 4  # held-out batches of every family


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="configs/train/yardstick.toml")
    parser.add_argument("--shrink", type=int, default=1, help="steps of warm-up and every stage, divided by this")
    parser.add_argument("--curves", help="file to append a line of losses to every 10 steps")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, YardstickRecipe)
    recipe = msgspec.structs.replace(recipe, stages=tuple(
        msgspec.structs.replace(stage, steps=max(1, stage.steps // args.shrink)) for stage in recipe.stages),
        optimizer=msgspec.structs.replace(recipe.optimizer, warmup_steps=recipe.optimizer.warmup_steps // args.shrink))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = run_tokenizer(recipe, Path(folder))
    config, material = model_config(recipe.model, tokenizer), Material(recipe, tokenizer)
    steps = sum(stage.steps for stage in recipe.stages)
    optimizer = make_optimizer(recipe.optimizer, steps)
    losses = {name: language_model_loss(config, shared_segment=OPENING, compute_dtype="bfloat16", fp8=fp8)
              for name, fp8 in (("bf16", ()), ("FP8", default_precision(config, True, None).weights))}
    train = {name: make_train_step(loss, optimizer) for name, loss in losses.items()}
    states = {name: init_state(stack(initial_params(recipe, config)), optimizer) for name in losses}
    recent, began = {name: [] for name in losses}, time.monotonic()
    for step in range(1, steps + 1):
        batch = material.of_step(step)
        for name in losses:
            states[name], metrics = train[name](states[name], {}, batch)
            recent[name].append(float(metrics["loss"]))
        if step % 10 == 0 or step == steps:
            left = (time.monotonic() - began) / step * (steps - step)
            shown = "  ".join(f"{name} {np.mean(values[-10:]):.4f}" for name, values in recent.items())
            print(f"step {step} of {steps}: {shown}  {left / 60:.0f} min left", file=sys.stderr)
            if args.curves:
                with open(args.curves, "a") as file:
                    print(step, *(f"{np.mean(values[-10:]):.5f}" for values in recent.values()), file=file)
    length = recipe.stages[-1].length
    batches = [material.batch(f"held out {family} {i}", [family], length, length) for family in FAMILIES
               for i in range(HELD_OUT)]
    last = max(1, steps // 10)
    print(f"{steps} steps, layers in FP8: {sum(default_precision(config, True, None).weights)} of {config.num_layers}")
    print(f"{'':8} {'loss, last tenth':>18} {'held out':>10} {'without effect':>16}")
    table = {}
    for name, state in states.items():
        # Both are judged in bf16, so that only the trained weights differ.
        total = [jax.jit(losses["bf16"])(state.trainable, {}, batch) for batch in batches]
        held_out = float(sum(nll for nll, _ in total) / sum(weight for _, (weight, _) in total))
        table[name] = np.mean(recent[name][-last:]), held_out
        print(f"{name:8} {table[name][0]:18.4f} {held_out:10.4f} {int(state.skipped):16d}")
    ratios = [f"{table['FP8'][column] / table['bf16'][column] - 1:+.2%}" for column in (0, 1)]
    print(f"{'FP8':8} {ratios[0]:>18} {ratios[1]:>10}")


if __name__ == "__main__":
    main()
