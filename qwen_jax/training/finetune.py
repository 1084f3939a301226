"""Fine-tuning and distillation by a recipe: ``qwen-jax train``."""
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
from jax.sharding import Mesh, NamedSharding

from qwen_jax.checkpoint import load_generation_config, load_params, load_tokenizer, resolve, save_hf
from qwen_jax.checkpoint.adapters import save_adapter
from qwen_jax.checkpoint.source import GENERATION_CONFIG, Source, read_json
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.model import abstract
from qwen_jax.model.lora import LoraConfig, init_adapter, num_parameters
from qwen_jax.parallel.mesh import make_mesh, shardings_of, spec_of
from qwen_jax.quantization import Precision, default_precision
from qwen_jax.training.curves import plot_curves
from qwen_jax.training.examples import Encoded, batch_function, read_examples, turn_end
from qwen_jax.training.loop import Run, fit
from qwen_jax.training.recipe import Recipe
from qwen_jax.training.stacked import LAYERS, stack, stacked_specs, unstack
from qwen_jax.training.step import (
    Loss,
    Params,
    distillation_loss,
    init_state,
    kept_for_backward,
    language_model_loss,
    make_optimizer,
    make_train_step,
)

RESULT = "result"


class Job(NamedTuple):
    """Trained and frozen parameters of a training run, and its loss with and without recomputed activations."""
    config: ModelConfig
    trainable: Params
    frozen: Params
    dtypes: dict[str, jnp.dtype]  # canonical path -> dtype of the model's parameter
    loss_with: dict[bool, Loss]   # recompute -> loss


def train(recipe: Recipe) -> Path:
    """Train a model by a recipe, or continue an interrupted run, and return the folder of the result.

    The result is a Hugging Face checkpoint in the model's own dtype, or with ``[lora]`` an adapter in PEFT's format.
    The output folder also gets ``metrics.jsonl`` and ``curves.png``. Raises UserError before any work for a model, data
    or setting that cannot be used, and for an output folder that already has a result.
    """
    output = Path(recipe.output)
    if (output / RESULT).exists():
        raise UserError(f"{output / RESULT} exists: this run is finished; name another output")
    source = resolve(recipe.model)
    tokenizer, lora = load_tokenizer(source), _lora(recipe)
    if tokenizer is None:
        raise UserError(f"{recipe.model} has no tokenizer, and the data is text")
    if recipe.sequence_length > source.config.max_context:
        raise UserError(f"sequence_length={recipe.sequence_length} exceeds the model's context of "
                        f"{source.config.max_context}")
    mesh = make_mesh(recipe.devices.data, recipe.devices.tensor) if recipe.devices else None
    teacher = _teacher(recipe, source, tokenizer)
    examples = read_examples(recipe.data, tokenizer, recipe.sequence_length, recipe.on_bad == "skip")
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    batch_of = batch_function(examples, recipe.batch_size, recipe.sequence_length, recipe.seed, pad)

    job = _distillation(recipe, source, teacher, mesh) if recipe.distill else _tuning(recipe, source, lora, mesh)
    count = sum(value.size for value in job.trainable.values())
    print(f"{count:,} of {job.config.num_parameters:,} parameters are trained, on {len(examples)} examples with "
          f"{sum(len(e.tokens) for e in examples):,} tokens", file=sys.stderr)
    rows = jax.tree.map(lambda x: x[:len(x) // recipe.accumulate // (recipe.devices.data if mesh else 1)], batch_of(1))
    megabytes = {recompute: kept_for_backward(loss, job.trainable, job.frozen, rows) / 1e6
                 for recompute, loss in job.loss_with.items()}
    print(f"from the forward to the backward pass {megabytes[recipe.recompute]:,.0f} MB are kept with recompute = "
          f"{str(recipe.recompute).lower()}; {megabytes[not recipe.recompute]:,.0f} MB would be with "
          f"{str(not recipe.recompute).lower()}", file=sys.stderr)

    optimizer = make_optimizer(recipe.optimizer, recipe.steps)
    specs = stacked_specs(job.config, mesh) if mesh else {}
    step = make_train_step(job.loss_with[recipe.recompute], optimizer, recipe.accumulate, mesh, specs)
    state = init_state(job.trainable, optimizer)
    if mesh:
        state = jax.device_put(state, shardings_of(state, mesh, specs))
    # A continued run may use another mesh.
    facts = {name: value for name, value in msgspec.to_builtins(recipe).items() if name != "devices"}
    run = Run(folder=output, steps=recipe.steps, checkpoint_every=recipe.checkpoint_every, keep=recipe.keep,
              max_skipped=recipe.max_skipped, facts=facts)
    state = fit(state, step, job.frozen, batch_of, run)

    ends = _generation_config(source, tokenizer, examples)
    if lora:
        save_adapter(state.trainable, job.config, lora, output / RESULT, base_model=recipe.model)
        if ends is not None:
            print(f"the adapter ends its turns with token {ends['eos_token_id'][0]}, which is not among those at which "
                  f"{recipe.model} stops: add it to eos_token_id in its {GENERATION_CONFIG}, or ask with "
                  "stop_token_ids", file=sys.stderr)
    else:
        trained = {path: value.astype(job.dtypes[path]) for path, value in unstack(state.trainable).items()}
        save_hf(jax.device_get(trained), job.config, output / RESULT, source.path, generation_config=ends)
    plot_curves(output / "metrics.jsonl", output / "curves.png")
    return output / RESULT


def _generation_config(source: Source, tokenizer: Any, examples: Sequence[Encoded]) -> dict[str, Any] | None:
    """Return the generation config of a model that has learned to end its turns as the chat template does.

    None when the model's own config has that token already, or nothing in the examples ends with it.
    """
    end, known = turn_end(tokenizer) if tokenizer.chat_template else None, load_generation_config(source).eos_token_ids
    if end is None or end in known or not any(end in example.tokens[example.learned] for example in examples):
        return None
    return {**read_json(source.path / GENERATION_CONFIG), "eos_token_id": [end, *known]}


def _lora(recipe: Recipe) -> LoraConfig | None:
    return LoraConfig(recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) if recipe.lora else None


def _load(source: Source, dtype, mesh: Mesh | None, precision: Precision | None = None
          ) -> tuple[Params, dict[str, jnp.dtype]]:
    """Load a model's parameters, stacked over the layers and split over the mesh; return them and their dtypes.

    The dtypes are by canonical path, with one for each layer.
    """
    places = {path: NamedSharding(mesh, spec_of(param.axes, param.shape, mesh))
              for path, param in abstract(source.config).items()} if mesh else None
    params = load_params(source, source.config, dtype, places, precision)
    dtypes = {path: value.dtype for path, value in params.items()}
    stacked = stack(params, consume=True)
    if mesh:
        stacked = jax.device_put(stacked, shardings_of(stacked, mesh, stacked_specs(source.config, mesh)))
    return stacked, dtypes


def _float32(params: Params) -> Params:
    return {path: value.astype(jnp.float32) for path, value in params.items()}


def _tuning(recipe: Recipe, source: Source, lora: LoraConfig | None, mesh: Mesh | None) -> Job:
    """Return the job that trains an adapter, or without `lora` the whole model, on the data alone."""
    precision = _precision(source.config, recipe)
    params, dtypes = _load(source, recipe.compute_dtype if lora else None, mesh, precision if lora else None)
    trainable, frozen = (init_adapter(source.config, lora, recipe.seed), params) if lora else (_float32(params), {})
    assert not lora or sum(value.size for value in trainable.values()) == num_parameters(source.config, lora)
    return Job(source.config, trainable, frozen, dtypes, {
        recompute: language_model_loss(source.config, lora=lora, recompute=recompute,
                                       compute_dtype=recipe.compute_dtype, fp8=precision.weights)
        for recompute in (False, True)})


def _precision(config: ModelConfig, recipe: Recipe) -> Precision:
    """Return which layers multiply in 8 bits under a recipe. UserError when ``fp8 = true`` leaves no such layer."""
    precision = default_precision(config, recipe.fp8, None)
    if recipe.fp8 and not any(precision.weights):
        raise UserError(f"fp8 = true changes nothing: of {config.num_layers} layers the first and the last stay as "
                        "they are")
    return precision


def _teacher(recipe: Recipe, source: Source, tokenizer) -> Source:
    """Return the checkpoint of a distillation's teacher, else the model's. UserError when the two do not fit."""
    if recipe.distill is None:
        return source
    teacher = resolve(recipe.distill.teacher) if recipe.distill.teacher else source
    if teacher.config.vocab_size != source.config.vocab_size or load_tokenizer(teacher).get_vocab() != \
            tokenizer.get_vocab():
        raise UserError(f"the teacher {recipe.distill.teacher} and {recipe.model} have different vocabularies: their "
                        "probabilities cannot be compared")
    if recipe.sequence_length > teacher.config.max_context:
        raise UserError(f"sequence_length={recipe.sequence_length} exceeds the teacher's context of "
                        f"{teacher.config.max_context}")
    layers, count = recipe.distill.layers or (0,), source.config.num_layers
    if min(layers) < 0 or max(layers) >= count or len(set(layers)) < len(layers):
        raise UserError(f"layers must name some of the model's layers, 0 to {count - 1}, once each, not {list(layers)}")
    return teacher


def _distillation(recipe: Recipe, source: Source, teacher: Source, mesh: Mesh | None) -> Job:
    """Return the job that trains a student, made of all or some of the model's layers, on data and teacher."""
    params, dtypes = _load(source, None, mesh)
    config, layers = source.config, recipe.distill.layers
    if layers:
        config = replace(config, num_layers=len(layers))
        params = {path: value[jnp.array(layers)] if path.startswith(LAYERS) else value
                  for path, value in params.items()}
    frozen, _ = _load(teacher, recipe.compute_dtype, mesh)
    return Job(config, _float32(params), frozen, dtypes, {
        recompute: distillation_loss(config, teacher.config, recipe.distill, recompute=recompute,
                                     compute_dtype=recipe.compute_dtype, fp8=_precision(config, recipe).weights)
        for recompute in (False, True)})
