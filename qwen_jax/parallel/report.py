"""Reports of the planner's plans, as `qwen-jax plan` prints them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen_jax.parallel.planner import PlanReport, Prediction, what_would_fit


def as_rows(report: PlanReport) -> Iterator[dict[str, Any]]:
    """Yield a mapping of sizes, predictions or reason for every plan: the best that fits first, the rejected last."""
    for rank, prediction in enumerate(report.feasible, 1):
        plan = prediction.plan
        yield {"data": plan.data, "stage": len(plan.stages), "tensor": plan.tensor, "feasible": True, "rank": rank,
               "first_token_seconds": prediction.first_token, "seconds_per_token": prediction.per_token,
               "tokens_per_second": prediction.tokens_per_second, "bytes": prediction.bytes,
               "memory": prediction.memory, "waste": plan.layout.waste, "layout": str(plan.layout),
               "layers_per_stage": list(plan.stages)}
    for name, reason in report.rejected:
        sizes = dict(part.split("=") for part in name.split())
        yield {**{axis: int(size) for axis, size in sizes.items()}, "feasible": False, "reason": reason}


def as_text(report: PlanReport) -> str:
    """Return a text report: a table of the plans that fit, and the rejected plans with their reasons."""
    request = report.request
    lines = [f"{request.devices} x {request.hardware.name} with {request.device_bytes / 1e9:g} GB, "
             f"{request.batch} sequences of {request.seq_len} tokens", ""]
    if report.feasible:
        lines.append("  data stage tensor   GB/device  first token   per token     tokens/s  padding")
        lines += map(_line, report.feasible)
        best = report.feasible[0]
        lines += ["", f"Memory of {best.plan} on each device, in GB: " + ", ".join(
            f"{name.replace('_', ' ')} {size / 1e9:.2f}" for name, size in best.memory.items() if size)]
        lines += [f"Its layout: {best.plan.layout}."]
    else:
        lines.append(f"Nothing fits; {what_would_fit(request)}.")
    if report.rejected:
        lines += ["", "Rejected:"] + [f"  {name}: {reason}" for name, reason in report.rejected]
    lines += ["", "Predicted by a roofline (docs/planner.md), not measured."]
    return "\n".join(lines)


def _line(prediction: Prediction) -> str:
    """Return the line of the table for one plan and its prediction."""
    plan = prediction.plan
    waste = ", ".join(f"{name.replace('_', ' ')} +{share:.1%}" for name, share in plan.layout.waste.items()
                      if share >= 0.0005)
    return (f"{plan.data:>6}{len(plan.stages):>6}{plan.tensor:>7}{prediction.bytes / 1e9:>12.1f}"
            f"{prediction.first_token * 1e3:>10.0f} ms{prediction.per_token * 1e3:>9.2f} ms"
            f"{prediction.tokens_per_second:>13,.0f}  {waste or 'none'}")
