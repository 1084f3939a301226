"""Planner of parallelism: all plans for a model on a number of devices, in the order of their predicted speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from qwen_kernels.page import PAGE

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError, check_positive_integer
from qwen_jax.parallel.hardware import Hardware
from qwen_jax.parallel.layout import layouts
from qwen_jax.parallel.plan import ParallelPlan, make_plan
from qwen_jax.parallel.roofline import ITEM, CostModel
from qwen_jax.quantization import Precision, default_precision

STEP_TOKENS = 8192  # tokens of the largest prefill step
RESERVE = 0.05  # share of a device's memory for the runtime
OBJECTIVES = ("latency", "throughput")


@dataclass(frozen=True)
class PlanRequest:
    """Request to the planner: a model, the devices for it, and the load that they are to carry.

    Attributes:
      config: the model.
      hardware: the kind of device.
      devices: number of devices.
      batch: number of sequences at once.
      seq_len: tokens of each sequence, prompt and answer together.
      dtype: "bfloat16" or "float32".
      precision: the model's 8-bit parts; by default there are none.
      memory: bytes of each device; by default those of its kind.
    """

    config: ModelConfig
    hardware: Hardware
    devices: int
    batch: int = 1
    seq_len: int = 4096
    dtype: str = "bfloat16"
    precision: Precision | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        for name in ("devices", "batch", "seq_len"):
            check_positive_integer(name, getattr(self, name))
        if self.dtype not in ITEM:
            raise UserError(f"dtype must be bfloat16 or float32, not {self.dtype!r}")
        if self.memory is not None and not self.memory > 0:
            raise UserError(f"a device's memory must be positive, not {self.memory!r} bytes")

    @property
    def device_bytes(self) -> float:
        """Bytes of memory of each device."""
        return self.hardware.memory if self.memory is None else self.memory


@dataclass(frozen=True)
class Prediction:
    """Memory and speed that the planner predicts for a plan.

    Attributes:
      plan: the plan.
      memory: bytes by item, on the device that needs the most.
      first_token: seconds for a single prompt of the whole length.
      per_token: seconds for a further token of each sequence.
      tokens_per_second: rate of all sequences together.
    """

    plan: ParallelPlan
    memory: dict[str, int]
    first_token: float
    per_token: float
    tokens_per_second: float

    @property
    def bytes(self) -> int:
        """Predicted bytes of memory, all items together, on the device that needs the most."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class PlanReport:
    """Answer of the planner to a request: the plans that fit, best first, and the rejected ones with reasons.

    Attributes:
      request: the request.
      feasible: plans that fit, the best first.
      rejected: name of each other plan, and the reason as a sentence.
    """

    request: PlanRequest
    feasible: list[Prediction]
    rejected: list[tuple[str, str]]


def plans(request: PlanRequest, objective: str = "latency") -> PlanReport:
    """Predict memory and speed of every division of all devices into replicas, stages and tensor parallelism.

    objective: "latency" for the least time per token, then to the first token; "throughput" for the most tokens per
    second.
    """
    if objective not in OBJECTIVES:
        raise UserError(f"objective must be {' or '.join(OBJECTIVES)}, not {objective!r}")
    feasible, rejected = [], []
    for data, stage, tensor in _factors(request.devices):
        name = f"data={data} stage={stage} tensor={tensor}"
        if stage > request.config.num_layers:
            rejected.append((name, f"a stage needs a layer at least, and the model has {request.config.num_layers}"))
            continue
        if data > request.batch:
            rejected.append((name, f"{data - request.batch} of its replicas would have nothing to do"))
            continue
        predictions = _predictions(request, data, stage, tensor)
        fitting = [prediction for prediction in predictions if prediction.bytes <= request.device_bytes]
        if fitting:
            feasible.append(min(fitting, key=lambda prediction: _order(prediction, objective)))
        else:
            rejected.append((name, _too_large(request, min(predictions, key=lambda prediction: prediction.bytes))))
    feasible.sort(key=lambda prediction: _order(prediction, objective))
    return PlanReport(request, feasible, rejected)


def best_tensor(request: PlanRequest, data: int, stage: int) -> ParallelPlan:
    """Return the plan with the least predicted time per token among those of ``data`` replicas of ``stage`` stages.

    Its degree of tensor parallelism is at most what ``request.devices`` allow. Raises UserError, which says what would
    fit, when no plan does.
    """
    predictions = [prediction for tensor in range(1, request.devices // (data * stage) + 1)
                   for prediction in _predictions(request, data, stage, tensor)]
    fitting = [prediction for prediction in predictions if prediction.bytes <= request.device_bytes]
    if not fitting:
        raise UserError(f"the model does not fit on {request.devices} x {request.device_bytes / 1e9:.0f} GB: "
                        f"{what_would_fit(request)}")
    return min(fitting, key=lambda prediction: _order(prediction, "latency")).plan


def predict(request: PlanRequest, plan: ParallelPlan) -> Prediction:
    """Predict a plan's memory and speed, whether or not it fits."""
    stages = len(plan.stages)
    costs = CostModel(request.config, plan, request.hardware, _precision(request), request.dtype)
    rows = -(-request.batch // plan.data)
    # With as many micro-batches as stages under way, each stage always has one, and a row's next token comes when all
    # have been through the slowest.
    size = -(-rows // stages)
    of_stages = [costs.step(stage, size, 1, request.seq_len).seconds for stage in range(stages)]
    per_token = costs.seconds(size, 1, request.seq_len)
    if rows >= stages:
        per_token = max(per_token, stages * max(of_stages))
    first_token = costs.seconds(1, request.seq_len, request.seq_len / 2)
    return Prediction(plan, _memory(request, costs, rows), first_token, per_token, request.batch / per_token)


def memory_of(costs: CostModel, stage: int, rows: int, seq_len: int, step: tuple[int, int]) -> dict[str, int]:
    """Return the bytes of memory that a device of a stage needs, by item: weights, caches, and a step's arrays.

    The load is ``rows`` sequences of ``seq_len`` tokens each.

    step: ``(rows, tokens)`` of the step that runs.
    """
    return {"weights": costs.weight_bytes(stage), **costs.state_bytes(stage, rows, seq_len),
            "step": costs.step_bytes(stage, *step)}


def _predictions(request: PlanRequest, data: int, stage: int, tensor: int) -> list[Prediction]:
    """Return predictions for these numbers of replicas, stages and devices per stage, one for each layout."""
    return [predict(request, make_plan(request.config, data, stage, tensor, layout=layout))
            for layout in layouts(request.config, tensor)]


def _memory(request: PlanRequest, costs: CostModel, rows: int) -> dict[str, int]:
    """Return bytes by item on the device that needs the most memory, in the largest of the engine's steps."""
    prefill = max(1, min(rows, STEP_TOKENS // request.seq_len)), min(STEP_TOKENS, request.seq_len)

    def of(stage: int) -> dict[str, int]:
        largest = max((memory_of(costs, stage, rows, request.seq_len, step) for step in (prefill, (rows, 1))),
                      key=lambda memory: memory["step"])
        return {**largest, "reserve": int(RESERVE * request.device_bytes)}

    return max(map(of, range(len(costs.plan.stages))), key=lambda memory: sum(memory.values()))


def what_would_fit(request: PlanRequest) -> str:
    """Return a sentence about changes with which the model would fit: fewer tokens at once, 8 bits, or more devices."""
    ways = []
    shorter = _largest(range(PAGE, request.seq_len, PAGE), lambda n: _fits(replace(request, seq_len=n)))
    if shorter:
        ways.append(f"sequences of {shorter} tokens instead of {request.seq_len}")
    fewer = _largest(range(1, request.batch), lambda n: _fits(replace(request, batch=n)))
    if fewer:
        ways.append(f"{fewer} sequences at once instead of {request.batch}")
    in_8_bits = default_precision(request.config, True, "e4m3", tables=True)
    if request.precision is None and _fits(replace(request, precision=in_8_bits)):
        ways.append("8-bit weights and KV cache")
    more = next((n for n in (2, 4, 8, 16, 32, 64, 128) if n > request.devices and _fits(replace(request, devices=n))),
                None)
    if more:
        ways.append(f"{more} such devices")
    return f"what would: {'; or '.join(ways)}" if ways else "not on 128 such devices either"


def same_memory(gigabytes: Sequence[float]) -> float:
    """Return the bytes of memory that each device has, from the gigabytes of all. Raises UserError if they differ."""
    if len(set(gigabytes)) > 1:
        raise UserError(f"the devices have different memories ({', '.join(f'{size:g}' for size in gigabytes)} GB), and "
                        f"a plan divides a model evenly: plan with {min(gigabytes):g} GB for each, or leave the "
                        "smaller ones out")
    return gigabytes[0] * 1e9


def _factors(devices: int) -> Iterator[tuple[int, int, int]]:
    """Yield every way to write ``devices`` as a product of replicas, stages and devices per stage."""
    for data in range(1, devices + 1):
        for stage in range(1, devices // data + 1):
            if devices % (data * stage) == 0:
                yield data, stage, devices // (data * stage)


def _order(prediction: Prediction, objective: str) -> tuple[float, ...]:
    """Return a sort key that puts the better predictions first, by the objective latency or throughput."""
    if objective == "latency":
        return prediction.per_token, prediction.first_token
    return -prediction.tokens_per_second, prediction.per_token


def _fits(request: PlanRequest) -> bool:
    return bool(plans(request).feasible)


def _largest(sizes: range, fits: Callable[[int], bool]) -> int | None:
    """Return the largest of ``sizes`` that fits, or None, by bisection: sizes below one that fits, fit too."""
    if not sizes or not fits(sizes[0]):
        return None
    low, high = 0, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low]


def _too_large(request: PlanRequest, prediction: Prediction) -> str:
    """Return the reason, as part of a sentence, for rejecting a plan that needs more than a device's memory."""
    largest = max(prediction.memory, key=prediction.memory.get)
    return (f"needs {prediction.bytes / 1e9:.1f} GB on a device of {request.device_bytes / 1e9:.1f}, most of it "
            f"{largest.replace('_', ' ')} ({prediction.memory[largest] / 1e9:.1f} GB)")


def _precision(request: PlanRequest) -> Precision:
    return request.precision or default_precision(request.config, False, None)
