"""Training over a mesh: the same numbers as on one device, and only the collectives that are meant."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from quick_xla import QUICK

from qwen_jax.errors import UserError
from qwen_jax.parallel.mesh import make_mesh

ROOT = Path(__file__).parents[2]


def run(code: str, *arguments: str) -> str:
    """Runs code in a process of its own, on four CPU devices."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **flags})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


STEPS = """
import re
import jax, jax.numpy as jnp, numpy as np
from qwen_jax.config import ModelConfig
from qwen_jax.model import init, params_of
from qwen_jax.model.lora import LoraConfig, init_adapter
from qwen_jax.parallel.mesh import make_mesh, shardings_of
from qwen_jax.training.batch import Batch
from qwen_jax.training.recipe import Optimizer
from qwen_jax.training.stacked import stack, stacked_specs
from qwen_jax.training.step import init_state, language_model_loss, make_optimizer, make_train_step

config = ModelConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=8, max_position_embeddings=256, tie_word_embeddings=False, dtype="float32")
lora = LoraConfig(4, 8.0, ("q_proj", "o_proj", "up_proj"))
rng, length = np.random.default_rng(0), 24
batches = [Batch(rng.integers(0, 320, (8, length)).astype(np.int32), rng.uniform(size=(8, length)).astype(np.float32),
                 np.zeros((8, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (8, 1)))
           for _ in range(4)]
params = stack(params_of(init(config, 0)))
params["layers.attention.bqkv"] += 0.3


def train(kind, data=0, tensor=0):
    mesh = make_mesh(data, tensor) if data else None
    adapter = init_adapter(config, lora, 1)
    adapter = {name: value + 0.1 for name, value in adapter.items()}
    trainable, frozen = (adapter, params) if kind == "lora" else (jax.tree.map(jnp.copy, params), {})
    optimizer = make_optimizer(Optimizer(1e-2, adam_eps=1e-4), 10)
    state, specs = init_state(trainable, optimizer), {}
    if mesh:
        specs = stacked_specs(config, mesh)
        assert specs.keys() == params.keys()
        state, frozen = (jax.device_put(tree, shardings_of(tree, mesh, specs)) for tree in (state, frozen))
    loss = language_model_loss(config, lora=lora if kind == "lora" else None, recompute=True)
    step = make_train_step(loss, optimizer, 2, mesh, specs)
    losses = []
    for batch in batches:
        before = jax.tree.map(lambda x: x.sharding, state)
        state, metrics = step(state, frozen, batch)
        assert not mesh or all(jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y, x.ndim), state,
                                                            before)))
        losses.append((float(metrics["loss"]), float(metrics["gradient_norm"]), float(metrics["accuracy"])))
    return np.array(losses), {name: np.asarray(value) for name, value in state.trainable.items()}, state
"""


def test_every_mesh_trains_as_one_device_does():
    run(STEPS + """
# On (1, 4) there are four devices and two KV heads: attention stays whole.
for kind, meshes in (("full", ((4, 1), (2, 2), (1, 4))), ("lora", ((2, 2),))):
    expected, trained, _ = train(kind)
    for data, tensor in meshes:
        losses, found, state = train(kind, data, tensor)
        np.testing.assert_allclose(losses, expected, rtol=2e-5)
        for name, value in trained.items():
            np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=f"{kind} {data} {tensor} {name}")
        if kind == "full" and tensor == 2:  # split where the rules say so, the optimiser's moments as well
            moment = state.optimizer[1][0].mu["layers.mlp.down"]
            for value in (state.trainable["layers.mlp.down"], moment):
                assert value.addressable_shards[0].data.shape == (2, 32, 24)
""")


def test_only_the_collectives_that_are_meant():
    """Read from the compiled step: gradients are added once, layers exchange activations only."""
    out = run(STEPS + """
import collections
from jax.sharding import NamedSharding, PartitionSpec


def collectives(data, tensor):
    mesh, compiled = make_mesh(data, tensor), []
    optimizer, specs = make_optimizer(Optimizer(1e-2), 10), stacked_specs(config, mesh)
    state = init_state(params, optimizer)
    state = jax.device_put(state, shardings_of(state, mesh, specs))
    jit = jax.jit
    jax.jit = lambda *args, **options: compiled.append(jit(*args, **options)) or compiled[-1]
    make_train_step(language_model_loss(config), optimizer, 2, mesh, specs)
    jax.jit = jit
    batch = jax.device_put(batches[0], NamedSharding(mesh, PartitionSpec("data")))
    found, place = collections.defaultdict(collections.Counter), None
    for line in compiled[0].lower(state, {}, batch).compile().as_text().splitlines():
        if header := re.match(r"(ENTRY )?%?[\\w.-]+ .*{$", line):
            place = "outside" if header.group(1) else "in loops"
        if call := re.search(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\\(", line):
            found[place][call.group(1)] += 1
    return {place: dict(count) for place, count in found.items()}


for shape in ((4, 1), (1, 2), (2, 2)):
    print(collectives(*shape))
""").splitlines()
    data, tensor, both = map(eval, out)
    assert data == {"outside": {"all-reduce": 1}}  # every gradient and metric in one
    # Two per layer forward and two backward; embedding and its gradient; the head's maximum, sums and gradient.
    for found in (tensor, both):
        assert set(found["in loops"]) == set(found["outside"]) == {"all-reduce"}
        assert found["in loops"]["all-reduce"] <= 9


RECIPE = """
model = "bundled"
data = ["{folder}/data.jsonl"]
output = "{folder}/run"
steps = 10
sequence_length = 128
batch_size = 4
compute_dtype = "float32"
checkpoint_every = 5

[optimizer]
learning_rate = 1e-3
"""


def test_a_run_that_goes_on_over_another_mesh(tmp_path):
    """Five steps on one device, five on four: the metrics of ten on one."""
    (tmp_path / "data.jsonl").write_text("".join(f'{{"text": "{word} {word} legit fraud R01 legit R00"}}\n'
                                                 for word in "ab cd ef gh ij kl mn op qr st uv".split()))
    alone = RECIPE.format(folder=tmp_path)
    (tmp_path / "alone.toml").write_text(alone)
    (tmp_path / "mesh.toml").write_text(alone + "[devices]\ndata = 2\ntensor = 2\n")
    code = """
import json, shutil, sys
from pathlib import Path
import numpy as np
from qwen_jax.checkpoint import load_params, resolve
from qwen_jax.cli import main
folder = Path(sys.argv[1])
results = []
for recipe in ("alone.toml", "mesh.toml"):
    assert main(["train", str(folder / recipe)]) == 0
    source = resolve(folder / "run" / "result")
    results.append({name: np.asarray(value) for name, value in load_params(source, source.config, "float32").items()})
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    print(lines[-1]["step"], lines[-1]["loss"], lines[-1]["gradient_norm"])
    for last in ("step-00000010", "result"):
        shutil.rmtree(folder / "run" / last)
for name, value in results[0].items():
    np.testing.assert_allclose(results[1][name], value, atol=2e-3 * abs(value).max(), err_msg=name)  # rounded to bf16
"""
    first, second = (line.split() for line in run(code, str(tmp_path)).splitlines() if line.startswith("10 "))
    assert [float(x) for x in second] == pytest.approx([float(x) for x in first], rel=1e-4)


def test_what_a_mesh_cannot_hold():
    with pytest.raises(UserError, match="needs 1024 devices, and there are"):
        make_mesh(512, 2)
