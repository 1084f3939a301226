"""Plans, their predicted cost, and the reasons of rejected plans."""

import os
import subprocess
import sys
from dataclasses import replace
from math import prod

import pytest
from memory_bench import Case, compare

from qwen_jax.config import PRESETS
from qwen_jax.engine.compiled import head
from qwen_jax.engine.config.resolve import ResolvedConfig
from qwen_jax.engine.core.replica import Deployment
from qwen_jax.engine.scheduling.buckets import Limits, bucket_table
from qwen_jax.engine.scheduling.schedule_policy import DEFAULT_POLICY
from qwen_jax.engine.weights import model_shard
from qwen_jax.errors import UserError
from qwen_jax.model import abstract, partition
from qwen_jax.parallel import roofline
from qwen_jax.parallel.hardware import HARDWARE, hardware, hardware_of
from qwen_jax.parallel.layout import layouts
from qwen_jax.parallel.plan import make_plan
from qwen_jax.parallel.planner import PlanRequest, best_tensor, plans, predict, same_memory, what_would_fit
from qwen_jax.parallel.roofline import CostModel
from qwen_jax.quantization import default_precision

SIZES = ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")


def preset(size):
    return PRESETS[f"qwen2.5-{size}"]


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_counted_as_the_model_has_them(size):
    config = preset(size)
    assert config.num_parameters == sum(prod(spec.shape) for spec in abstract(config).values())


@pytest.mark.parametrize("size, sizes, fp8", [("0.5b", (1, 2, 3), False), ("7b", (1, 1, 8), False),
                                              ("7b", (1, 3, 2), True), ("14b", (2, 1, 4), True)])
def test_weights_take_as_many_bytes_as_the_engine_would_allocate(size, sizes, fp8):
    config = replace(preset(size), num_layers=6)
    plan, precision = make_plan(config, *sizes), default_precision(config, fp8, None, tables=fp8)
    limits = Limits(1, 128, ((1, 64),), (), (2,), 1)
    deployment = Deployment(plan, ResolvedConfig(config, "bfloat16", precision, bucket_table(limits), limits,
                                                 policy=DEFAULT_POLICY, sparsity=()))
    work = CostModel(config, plan, hardware("h100"), precision)
    assert max(work.weight_bytes(stage) for stage in range(len(plan.stages))) == deployment.bytes_per_device


def test_a_decode_step_by_hand():
    """72B, 8 devices, 32 rows of 2,048 tokens: an eighth of the weights and of the cache is read."""
    config, card = preset("72b"), hardware("h100")
    costs = CostModel(config, make_plan(config, tensor=8), card, default_precision(config, False, None))
    step = costs.step(0, 32, 1, 2048)
    weights = 2 * (config.num_parameters - config.vocab_size * config.hidden_size) / 8  # rows are looked up
    cache = 32 * 2048 * 2 * 80 * 8 * 128 * 2 / 8
    assert step.bytes == pytest.approx(weights + cache, rel=1e-3)
    products = 2 * 32 * (config.num_parameters - config.vocab_size * config.hidden_size) / 8
    attention = 32 * 80 * 4 * 2048 * 64 * 128 / 8
    assert step.flops == pytest.approx(products + attention, rel=1e-3)
    sums = 161 * 32 * 8192 * 2
    assert step.collective_bytes == (2 * sums + 32 * 152_064 * 4) * 7 / 8 and step.collectives == 163
    expected = step.bytes / (0.8 * 3.35e12) + step.collective_bytes / (0.8 * 450e9) + 163 * 10e-6
    assert step.seconds == pytest.approx(expected)


@pytest.mark.parametrize("size, card, devices", [("72b", "a100", 8), ("7b", "a10", 4)])
def test_the_two_machines_of_the_first_description(size, card, devices):
    report = plans(PlanRequest(preset(size), hardware(card), devices, batch=8))
    assert report.feasible and report.feasible[0].plan.tensor == devices
    assert all(one.plan.devices == devices and one.bytes <= hardware(card).memory for one in report.feasible)
    names = [str(one.plan) for one in report.feasible] + [name for name, _ in report.rejected]
    assert len(names) == len(set(names)) == {8: 10, 4: 6}[devices]


def test_throughput_and_latency_may_want_different_plans():
    """A small model with many short requests on slow links: replicas need none."""
    request = PlanRequest(preset("0.5b"), hardware("a10"), 4, batch=64, seq_len=256)
    assert plans(request, "throughput").feasible[0].plan.data == 4
    order = [one.per_token for one in plans(request, "latency").feasible]
    assert order == sorted(order)
    order = [one.tokens_per_second for one in plans(request, "throughput").feasible]
    assert order == sorted(order, reverse=True)


def test_the_layout_with_the_least_waste_is_not_always_the_best():
    """14B on five devices: copying all KV heads to every device would read five times the cache."""
    config = preset("14b")
    found = plans(PlanRequest(config, hardware("a100"), 5, batch=16, seq_len=8192)).feasible[0].plan
    assert found.tensor == 5 and found.layout == layouts(config, 5)[0] and found.layout.waste["query_heads"] == 0.25


@pytest.mark.parametrize("size", SIZES)
def test_more_devices_take_less_of_each_and_more_rows_take_longer(size):
    one = [predict(PlanRequest(preset(size), hardware("h200"), tensor, 8), make_plan(preset(size), tensor=tensor))
           for tensor in (1, 2, 4, 8)]
    assert [each.bytes for each in one] == sorted((each.bytes for each in one), reverse=True)
    times = [predict(PlanRequest(preset(size), hardware("h200"), 8, rows), make_plan(preset(size), tensor=8)).per_token
             for rows in (1, 8, 64, 512)]
    assert times == sorted(times)


def test_what_does_not_fit_says_what_would():
    assert what_would_fit(PlanRequest(preset("72b"), hardware("a10"), 4)).startswith(
        "what would: 8-bit weights and KV cache; or 8 such")
    longer = PlanRequest(preset("7b"), hardware("a10"), 1, batch=4, seq_len=131_072)
    assert "tokens instead of 131072" in what_would_fit(longer)
    assert what_would_fit(PlanRequest(preset("72b"), hardware("a10"), 1, memory=1e8)) == \
        "not on 128 such devices either"
    length = int(what_would_fit(longer).split("sequences of ")[1].split()[0])
    assert plans(replace(longer, seq_len=length)).feasible and not plans(replace(longer, seq_len=length + 64)).feasible


def test_automatic_degree():
    assert best_tensor(PlanRequest(preset("72b"), hardware("h100"), 8, 8), 1, 1).tensor == 8
    # Links so slow that more devices lose.
    slow = replace(hardware("a10"), collective_seconds=1.0)
    assert best_tensor(PlanRequest(preset("0.5b"), slow, 8), 1, 1).tensor == 1
    assert best_tensor(PlanRequest(preset("7b"), hardware("h100"), 8, 8), 2, 2).devices <= 8
    with pytest.raises(UserError, match="does not fit on 2 x 24 GB: what would"):
        best_tensor(PlanRequest(preset("72b"), hardware("a10"), 2), 1, 1)


@pytest.mark.parametrize("changes, message", [({"devices": 0}, "devices"), ({"batch": True}, "batch"),
                                              ({"seq_len": -1}, "seq_len"), ({"dtype": "float16"}, "dtype"),
                                              ({"memory": 0}, "memory")])
def test_bad_requests(changes, message):
    with pytest.raises(UserError, match=message):
        PlanRequest(**{"config": preset("7b"), "hardware": hardware("a10"), "devices": 1, **changes})


def test_bad_devices():
    with pytest.raises(UserError, match="different memories .* plan with 16 GB for each"):
        same_memory([24, 16, 24])
    assert same_memory([80.0, 80.0]) == 80e9
    with pytest.raises(UserError, match="the device must be one of a10, .*, not 'b200'"):
        hardware("b200")
    with pytest.raises(UserError, match="give tp_size as a number"):
        hardware_of("TPU v5")
    kinds = {"NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA A10": "a10", "cpu": "cpu",
             "NVIDIA A100-PCIE-40GB": "a100-40", "NVIDIA H100 80GB HBM3": "h100"}
    assert all(hardware_of(kind) is HARDWARE[name] for kind, name in kinds.items())


@pytest.mark.parametrize("case", [Case("3b", 2, 4, 1, 16, (1, 1024)), Case("0.5b", 2, 1, 2, 4, (2, 256))], ids=str)
def test_memory_is_what_the_engines_programs_take(case):
    """Compare every program and stage; twenty on released widths: scripts/bench/planner_memory.py."""
    found = list(compare(case))
    assert len(found) == 2 * case.stages
    assert all(0.9 < one.ratio < 1.1 for one in found), found


def test_steps_are_the_engines():
    assert (roofline.SPARSE_ABOVE, roofline.SCATTER_FROM, roofline.OVERLAP_FROM, roofline.SAMPLED_ROWS,
            roofline.SCORED_TOKENS, roofline.HALF_MULTIPLE) == (
        DEFAULT_POLICY.sparse_above_tokens, model_shard.SCATTER_FROM, model_shard.OVERLAP_FROM["gpu"],
        head.SAMPLED_ROWS, head.SCORED_TOKENS, partition.HALF_MULTIPLE)


def test_a_large_prefill_by_hand():
    """72B, 8 devices, a prompt of 4,096 tokens: each half-sum is hidden by what the other half computes beside it."""
    config, card = preset("72b"), hardware("h100")
    precision = default_precision(config, False, None)
    step = CostModel(config, make_plan(config, tensor=8), card, precision).step(0, 1, 4096, 2048)
    assert step.collectives == 2 * 2 * 161 + 2  # a reduce-scatter and an all-gather of every half
    half = 2048 * 8192 * 2
    assert step.collective_bytes == (2 * 2 * 161 * half + 152_064 * 4) * 7 / 8
    one = 2 * half * 7 / 8 / (0.8 * 450e9) + 2 * 10e-6
    attention = 2048 * (2 * 8192 * (2 * 8 + 2) * 128 + 4 * 2048 * 8 * 128) / (0.6 * 989e12)
    mlp = 2048 * 2 * 3 * 8192 * 29568 / 8 / (0.6 * 989e12)
    assert attention < one < mlp
    logits = 152_064 * 4 * 7 / 8 / (0.8 * 450e9) + 20e-6
    assert step.exchanging == pytest.approx(80 * 2 * (one - attention) + 2 * one + logits, rel=1e-3)
    alone = CostModel(config, make_plan(config), card, precision).step(0, 1, 4096, 2048)
    assert alone.exchanging == 0 and 7 < alone.seconds / step.seconds < 8


def test_xla_takes_the_flags_of_every_device():
    """XLA ends the process for flags that it does not know."""
    kinds = sorted({" ".join(card.xla_flags) for card in HARDWARE.values() if card.xla_flags})
    assert len(kinds) == 2 and HARDWARE["cpu"].xla_flags == ()
    code = "import jax; jax.devices()"
    for flags in (*kinds, "--xla_gpu_no_such_flag=true"):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        done = subprocess.run([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
        assert (done.returncode == 0) == (flags in kinds), done.stderr
