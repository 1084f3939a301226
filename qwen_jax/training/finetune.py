"""Fine-tuning as a recipe describes it: ``qwen-jax train``."""
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp

from qwen_jax.checkpoint import load_params, load_tokenizer, resolve, save_hf
from qwen_jax.checkpoint.adapters import save_adapter
from qwen_jax.errors import UserError
from qwen_jax.model.lora import LoraConfig, init_adapter, num_parameters
from qwen_jax.training.curves import plot_curves
from qwen_jax.training.examples import batch_function, read_examples
from qwen_jax.training.loop import Run, fit
from qwen_jax.training.recipe import Recipe
from qwen_jax.training.stacked import stack, unstack
from qwen_jax.training.step import init_state, language_model_loss, make_optimizer, make_train_step

RESULT = "result"


def train(recipe: Recipe) -> Path:
    """Runs a recipe, or continues it, and returns the folder of the result.

    The result is a Hugging Face checkpoint in the model's own dtype, or with ``[lora]`` an adapter in PEFT's format.
    The output folder also gets ``metrics.jsonl`` and ``curves.png``. Raises UserError before any work for a model, data
    or setting that cannot be used, and for an output that is finished already.
    """
    output = Path(recipe.output)
    if (output / RESULT).exists():
        raise UserError(f"{output / RESULT} exists: this run is finished; name another output")
    source = resolve(recipe.model)
    config, tokenizer = source.config, load_tokenizer(source)
    lora = LoraConfig(recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) if recipe.lora else None
    if tokenizer is None:
        raise UserError(f"{recipe.model} has no tokenizer, and the data is text")
    if recipe.sequence_length > config.max_context:
        raise UserError(f"sequence_length={recipe.sequence_length} exceeds the model's context of {config.max_context}")
    examples = read_examples(recipe.data, tokenizer, recipe.sequence_length, recipe.on_bad)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batch_of = batch_function(examples, recipe.batch_size, recipe.sequence_length, recipe.seed, pad)

    params = load_params(source, config, recipe.compute_dtype if lora else None)
    dtypes = {path: value.dtype for path, value in params.items()}
    frozen = stack(params) if lora else {}
    trainable = (init_adapter(config, lora, recipe.seed) if lora else
                 {path: value.astype(jnp.float32) for path, value in stack(params).items()})
    del params
    count = sum(value.size for value in trainable.values())
    assert not lora or count == num_parameters(config, lora)
    print(f"{count:,} of {config.num_parameters:,} parameters are trained, on {len(examples)} examples with "
          f"{sum(len(e.tokens) for e in examples):,} tokens", file=sys.stderr)

    optimizer = make_optimizer(recipe.optimizer, recipe.steps)
    loss = language_model_loss(config, lora=lora, recompute=recipe.recompute, compute_dtype=recipe.compute_dtype)
    step = make_train_step(loss, optimizer, recipe.accumulate)
    run = Run(output, recipe.steps, recipe.checkpoint_every, recipe.keep, recipe.max_skipped, facts=asdict(recipe))
    state = fit(init_state(trainable, optimizer), step, frozen, batch_of, run)

    if lora:
        save_adapter(state.trainable, config, lora, output / RESULT, base_model=recipe.model)
    else:
        trained = {path: value.astype(dtypes[path]) for path, value in unstack(state.trainable).items()}
        save_hf(jax.device_get(trained), config, output / RESULT, source.path)
    plot_curves(output / "metrics.jsonl", output / "curves.png")
    return output / RESULT
