"""Which plans a model can have on some devices, in the order of what they are predicted to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qwen_kernels.attention import PAGE

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.parallel.hardware import Hardware
from qwen_jax.parallel.layout import layouts
from qwen_jax.parallel.plan import ParallelPlan, make_plan
from qwen_jax.parallel.roofline import ITEM, Work
from qwen_jax.quantization import Precision, default_precision

STEP_TOKENS = 8192  # of the largest prefill step
RESERVE = 0.05  # of a device's memory, for the runtime
OBJECTIVES = ("latency", "throughput")


@dataclass(frozen=True)
class Request:
    """What is planned for: ``batch`` sequences at once of ``seq_len`` tokens each, prompt and answer together."""

    config: ModelConfig
    hardware: Hardware
    devices: int
    batch: int = 1
    seq_len: int = 4096
    dtype: str = "bfloat16"
    precision: Precision | None = None
    memory: float | None = None  # bytes of each device; by default its kind's

    def __post_init__(self) -> None:
        for name in ("devices", "batch", "seq_len"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a positive integer, not {value!r}")
        if self.dtype not in ITEM:
            raise UserError(f"dtype must be bfloat16 or float32, not {self.dtype!r}")
        if self.memory is not None and not self.memory > 0:
            raise UserError(f"a device's memory must be positive, not {self.memory!r} bytes")

    @property
    def device_bytes(self) -> float:
        return self.hardware.memory if self.memory is None else self.memory


@dataclass(frozen=True)
class Predicted:
    """A plan and what it is predicted to do.

    Attributes:
      memory: bytes by item, on the device that needs the most.
      first_token: seconds for one prompt of the whole length; per_token: seconds for one more token of each sequence.
      tokens_per_second: of all sequences together.
    """

    plan: ParallelPlan
    memory: dict[str, int]
    first_token: float
    per_token: float
    tokens_per_second: float

    @property
    def bytes(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Report:
    """Plans that fit, the best first, and why the others do not: a plan's name and a sentence."""

    request: Request
    feasible: list[Predicted]
    rejected: list[tuple[str, str]]


def plans(request: Request, objective: str = "latency", *, most_data: int | None = None,
          most_stages: int | None = None) -> Report:
    """Every way to use all of the devices.

    objective: "latency" for the least time per token, then to the first one; "throughput" for the most tokens per
    second. most_data, most_stages: leave out plans with more.
    """
    if objective not in OBJECTIVES:
        raise UserError(f"objective must be {' or '.join(OBJECTIVES)}, not {objective!r}")
    feasible, rejected = [], []
    for data, stage, tensor in _factors(request.devices):
        name = f"data={data} stage={stage} tensor={tensor}"
        if data > (most_data or data) or stage > (most_stages or stage):
            continue
        if stage > request.config.num_layers:
            rejected.append((name, f"a stage needs a layer at least, and the model has {request.config.num_layers}"))
            continue
        if data > request.batch:
            rejected.append((name, f"{data - request.batch} of its replicas would have nothing to do"))
            continue
        # Of the layouts of one degree the best that fits.
        found = [predict(request, make_plan(request.config, data, stage, tensor, layout=layout))
                 for layout in layouts(request.config, tensor)]
        fitting = [one for one in found if one.bytes <= request.device_bytes]
        if fitting:
            feasible.append(min(fitting, key=lambda one: _order(one, objective)))
        else:
            rejected.append((name, _too_large(request, min(found, key=lambda one: one.bytes))))
    feasible.sort(key=lambda one: _order(one, objective))
    return Report(request, feasible, rejected)


def best_plan(request: Request, objective: str = "latency", **limits: int) -> Predicted:
    """The first of `plans`; UserError, which says what would fit, when there is none."""
    report = plans(request, objective, **limits)
    if not report.feasible:
        raise UserError(f"the model does not fit on {request.devices} x {request.device_bytes / 1e9:.0f} GB: "
                        f"{what_would_fit(request)}")
    return report.feasible[0]


def best_tensor(request: Request, data: int, stage: int) -> ParallelPlan:
    """The plan with so many replicas and stages whose degree of tensor parallelism, of those that ``request.devices``
    allow, gives a token soonest. UserError, which says what would fit, when none does."""
    found = [predict(request, make_plan(request.config, data, stage, tensor, layout=layout))
             for tensor in range(1, request.devices // (data * stage) + 1)
             for layout in layouts(request.config, tensor)]
    fitting = [one for one in found if one.bytes <= request.device_bytes]
    if not fitting:
        raise UserError(f"the model does not fit on {request.devices} x {request.device_bytes / 1e9:.0f} GB: "
                        f"{what_would_fit(request)}")
    return min(fitting, key=lambda one: _order(one, "latency")).plan


def predict(request: Request, plan: ParallelPlan) -> Predicted:
    """Without asking whether it fits."""
    stages = len(plan.stages)
    work = Work(request.config, plan, request.hardware, _precision(request), request.dtype)
    rows = -(-request.batch // plan.data)
    # With as many micro-batches as stages under way, each stage always has one, and a row's next token comes when all
    # have been through the slowest.
    size = -(-rows // stages)
    each = [work.step(stage, size, 1, request.seq_len).seconds for stage in range(stages)]
    per_token = work.seconds(size, 1, request.seq_len)
    if rows >= stages:
        per_token = max(per_token, stages * max(each))
    first_token = work.seconds(1, request.seq_len, request.seq_len / 2)
    return Predicted(plan, _memory(request, work, rows), first_token, per_token, request.batch / per_token)


def memory_of(work: Work, stage: int, rows: int, seq_len: int, step: tuple[int, int]) -> dict[str, int]:
    """Bytes by item on one device of a stage: for ``rows`` sequences of ``seq_len`` tokens each, while it works on a
    step of ``(rows, tokens)``."""
    return {"weights": work.weight_bytes(stage), **work.state_bytes(stage, rows, seq_len),
            "step": work.step_bytes(stage, *step)}


def _memory(request: Request, work: Work, rows: int) -> dict[str, int]:
    """Bytes by item of the device that needs the most, in the largest of the engine's steps."""
    prefill = max(1, min(rows, STEP_TOKENS // request.seq_len)), min(STEP_TOKENS, request.seq_len)

    def of(stage: int) -> dict[str, int]:
        largest = max((memory_of(work, stage, rows, request.seq_len, step) for step in (prefill, (rows, 1))),
                      key=lambda memory: memory["step"])
        return {**largest, "reserve": int(RESERVE * request.device_bytes)}

    return max(map(of, range(len(work.plan.stages))), key=lambda memory: sum(memory.values()))


def what_would_fit(request: Request) -> str:
    """A sentence for somebody whose model does not: fewer tokens at once, 8 bits, or more devices."""
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
    """Bytes of each device. UserError when they differ: a plan divides the model evenly."""
    if len(set(gigabytes)) > 1:
        raise UserError(f"the devices have different memories ({', '.join(f'{one:g}' for one in gigabytes)} GB), and a "
                        f"plan divides a model evenly: plan with {min(gigabytes):g} GB for each, or leave the smaller "
                        "ones out")
    return gigabytes[0] * 1e9


def _factors(devices: int) -> Iterator[tuple[int, int, int]]:
    for data in range(1, devices + 1):
        for stage in range(1, devices // data + 1):
            if devices % (data * stage) == 0:
                yield data, stage, devices // (data * stage)


def _order(one: Predicted, objective: str) -> tuple[float, ...]:
    if objective == "latency":
        return one.per_token, one.first_token
    return -one.tokens_per_second, one.per_token


def _fits(request: Request) -> bool:
    return bool(plans(request).feasible)


def _largest(sizes: range, fits) -> int | None:
    """By bisection: what fits, fits when it is smaller."""
    if not sizes or not fits(sizes[0]):
        return None
    low, high = 0, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low]


def _too_large(request: Request, one: Predicted) -> str:
    largest = max(one.memory, key=one.memory.get)
    return (f"needs {one.bytes / 1e9:.1f} GB on a device of {request.device_bytes / 1e9:.1f}, most of it "
            f"{largest.replace('_', ' ')} ({one.memory[largest] / 1e9:.1f} GB)")


def _precision(request: Request) -> Precision:
    return request.precision or default_precision(request.config, False, None)
