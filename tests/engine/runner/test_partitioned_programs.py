"""Programs of one device in tensor parallelism: their collectives, bytes and operations."""

from collections import Counter
from dataclasses import replace

import pytest
from parallel_bench import LIMITS, engine_of, shrunk

from qwen_jax import Engine
from qwen_jax.config import PRESETS
from qwen_jax.engine.config.memory import weight_bytes
from qwen_jax.engine.core.replica import Deployment
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.engine.weights.model_shard import OVERLAP_FROM
from qwen_jax.parallel.plan import make_plan

WHOLE = {"layers_per_program": 100}  # steps of one program
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "collective_permute", "collective_broadcast")


def collectives(lowered) -> Counter:
    """Count the collectives in a lowered program, before XLA has seen it, by kind and type of the result.

    The body of a loop and the branches of a condition count once, a function as often as it is called.
    """
    module = lowered.compiler_ir("stablehlo")
    functions = _functions(module)
    found: Counter = Counter()

    def walk(op):
        name = op.operation.name
        if name == "func.call":
            walk(functions[op.attributes["callee"].value])
        kind = name.removeprefix("stablehlo.")
        if kind in KINDS:
            for result in op.operation.results:
                found[kind, str(result.type)] += 1
        for region in op.operation.regions:
            for block in region:
                for inner in block.operations:
                    walk(inner)

    walk(functions["main"])
    return found


def program(engine, phase):
    bucket = next(bucket for bucket in engine.runner.table if bucket.phase == phase)
    return engine.runner.steps.lower((bucket, 0))


@pytest.mark.parametrize("size, tensor", [("7b", 4), ("0.5b", 3)])
def test_a_decode_step_has_these_collectives_and_no_others(size, tensor):
    """Two sums for each layer, one for the look-up, the logits of its rows, and which rows tripped."""
    engine = engine_of(size, tp_size=tensor, warmup=False, **WHOLE)
    layers, hidden, vocab = engine.config.num_layers, engine.config.hidden_size, engine.plan.layout.vocab
    assert collectives(program(engine, "decode")) == {
        ("all_reduce", f"tensor<4x1x{hidden}xf32>"): 2 * layers + 1,
        ("all_gather", f"tensor<4x{vocab}xf32>"): 1,
        ("all_reduce", "tensor<4xi32>"): 1,
    }


def test_a_small_prefill_has_those_and_the_logits_of_scored_prompts():
    engine = engine_of("7b", tp_size=4, warmup=False, **WHOLE)
    layers, hidden, vocab = engine.config.num_layers, engine.config.hidden_size, engine.plan.layout.vocab
    assert collectives(program(engine, "prefill")) == {
        ("all_reduce", f"tensor<2x64x{hidden}xf32>"): 2 * layers + 1,
        ("all_gather", f"tensor<2x{vocab}xf32>"): 1,
        ("all_gather", f"tensor<64x{vocab}xf32>"): 1,
        ("all_reduce", "tensor<2xi32>"): 1,
    }


def test_a_large_prefill_divides_the_tokens_between_products(monkeypatch):
    """Sequence parallelism: every sum is a reduce-scatter, and an all-gather before the next product."""
    monkeypatch.setattr("qwen_jax.engine.weights.model_shard.SCATTER_FROM", 128)
    engine = engine_of("7b", tp_size=4, warmup=False, **WHOLE)
    layers, hidden, vocab = engine.config.num_layers, engine.config.hidden_size, engine.plan.layout.vocab
    assert collectives(program(engine, "prefill")) == {
        ("reduce_scatter", f"tensor<2x16x{hidden}xf32>"): 2 * layers + 1,
        ("all_gather", f"tensor<2x64x{hidden}xf32>"): 2 * layers + 1,
        ("all_gather", f"tensor<2x{vocab}xf32>"): 1,
        ("all_gather", f"tensor<64x{vocab}xf32>"): 1,
        ("all_reduce", "tensor<2xi32>"): 1,
    }


def in_halves(monkeypatch, tensor) -> Engine:
    monkeypatch.setattr("qwen_jax.engine.weights.model_shard.SCATTER_FROM", 256)
    monkeypatch.setitem(OVERLAP_FROM, "cpu", 256)
    return engine_of("7b", tp_size=tensor, limits=Limits(4, 256, ((1, 256),), (), (4,), decode_steps=4), warmup=False,
                     **WHOLE)


@pytest.mark.parametrize("tensor, share", [(4, 32), (3, None)])
def test_the_largest_prefills_go_in_two_halves(tensor, share, monkeypatch):
    """Twice as many collectives move the same bytes; where halves do not divide over the devices, sums are whole."""
    engine = in_halves(monkeypatch, tensor)
    layers, hidden, vocab = engine.config.num_layers, engine.config.hidden_size, engine.plan.layout.vocab
    sums = {("reduce_scatter", f"tensor<1x{share}x{hidden}xf32>"): 2 * (2 * layers + 1),
            ("all_gather", f"tensor<1x128x{hidden}xf32>"): 2 * (2 * layers + 1)} if share else {
        ("all_reduce", f"tensor<1x128x{hidden}xf32>"): 2 * (2 * layers + 1)}
    assert collectives(program(engine, "prefill")) == {
        **sums,
        ("all_gather", f"tensor<1x{vocab}xf32>"): 1,
        ("all_gather", f"tensor<64x{vocab}xf32>"): 1,
        ("all_reduce", "tensor<1xi32>"): 1,
    }


def test_devices_compute_one_half_while_they_exchange_the_other(monkeypatch):
    """Every sum of a layer has products that neither wait for it nor it for them. In one piece there are none."""
    for halves in (True, False):
        engine = in_halves(monkeypatch, 3)
        if not halves:
            monkeypatch.setitem(OVERLAP_FROM, "cpu", 0)
            engine = engine_of("7b", tp_size=3, limits=engine.limits, warmup=False, **WHOLE)
        shape = f"tensor<1x{128 if halves else 256}x{engine.config.hidden_size}xf32>"
        beside = products_beside_sums(program(engine, "prefill"), shape)
        assert len(beside) == (1 + halves) * (2 * engine.config.num_layers + 1)
        assert all(beside) if halves else not any(beside)


def products_beside_sums(lowered, shape: str) -> list[int]:
    """Return, for every sum of this shape and type, how many products of its block could run at the same time."""
    module = lowered.compiler_ir("stablehlo")
    functions, found = _functions(module), []

    def walk(block):
        operations = list(block.operations)
        made_by = {result: place for place, op in enumerate(operations) for result in op.operation.results}
        needs: list[set[int]] = []  # of every operation, all before it
        for op in operations:
            direct = {made_by[name] for name in taken(op) if name in made_by}
            needs.append(direct.union(*(needs[place] for place in direct)))
        products = [place for place, op in enumerate(operations) if has_product(op, functions)]
        for place, op in enumerate(operations):
            if op.operation.name == "stablehlo.all_reduce" and str(op.operation.results[0].type) == shape:
                found.append(sum(place not in needs[other] and other not in needs[place] for other in products))
            for region in op.operation.regions:
                for inner in region:
                    walk(inner)

    walk(module.body)
    return found


def _functions(module) -> dict:
    return {op.attributes["sym_name"].value: op for op in module.body.operations}


def taken(op) -> set:
    """Return the values that an operation and the operations inside it use."""
    names = set(op.operation.operands)
    return names.union(*(taken(inner) for region in op.operation.regions for block in region
                         for inner in block.operations))


def has_product(op, functions) -> bool:
    if op.operation.name == "func.call":
        return has_product(functions[op.attributes["callee"].value], functions)
    return op.operation.name == "stablehlo.dot_general" or any(
        has_product(inner, functions) for region in op.operation.regions for block in region
        for inner in block.operations)


def test_one_device_has_none():
    assert not collectives(program(engine_of("7b", warmup=False, **WHOLE), "decode"))


def deployment(config, tensor, dtype="bfloat16") -> Deployment:
    """Return a deployment of which nothing is allocated."""
    from qwen_kernels.sparse_attention import Sparsity

    from qwen_jax.engine.config.resolve import ResolvedConfig, precision_of
    from qwen_jax.engine.scheduling.buckets import bucket_table
    from qwen_jax.engine.scheduling.schedule_policy import DEFAULT_POLICY

    resolved = ResolvedConfig(config, dtype, precision_of(config, False, None), bucket_table(LIMITS), LIMITS,
                              policy=DEFAULT_POLICY, sparsity=(Sparsity(),) * config.num_layers)
    return Deployment(make_plan(config, tensor=tensor), resolved)


def test_72b_on_eight_devices_takes_an_eighth_of_the_memory_on_each():
    config = PRESETS["qwen2.5-72b"]
    divided = deployment(config, 8)
    assert divided.bytes_per_device <= weight_bytes(config, "bfloat16", divided.config.precision) / 8 * 1.03
    shard = divided.sharding.shards[0]
    assert shard.device_config.num_kv_heads * 8 == config.num_kv_heads  # and so of keys and values


def test_72b_on_eight_devices_takes_an_eighth_of_the_operations_on_each():
    """Programs of two layers, embedding and head are compiled, not run."""
    limits = Limits(32, 128, ((1, 64),), (), (32,))
    config = replace(PRESETS["qwen2.5-72b"], num_layers=2)
    flops = []
    for tensor in (1, 8):
        engine = Engine(_shapes(config), limits=limits, tp_size=tensor, dtype="bfloat16", warmup=False, cache_dir=None,
                        kv_cache_bytes=1 << 30, progress=False, **WHOLE)
        compiled = [program(engine, phase).compile() for phase in ("prefill", "decode")]
        flops.append([executable.cost_analysis()["flops"] for executable in compiled])
    for whole, part in zip(*flops, strict=True):
        assert part <= whole / 8 * 1.03
        assert part >= whole / 8 * 0.99  # nothing was left out


def _shapes(config):
    from qwen_jax.model import empty

    return empty(config, "bfloat16")


def test_shrunk_is_what_it_says():
    assert shrunk("7b").num_heads == PRESETS["qwen2.5-7b"].num_heads
