"""What `qwen-jax plan` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen_jax.parallel.planner import Predicted, Report, what_would_fit


def as_rows(report: Report) -> Iterator[dict[str, Any]]:
    """One mapping for every plan, those that fit first and best first."""
    for rank, one in enumerate(report.feasible, 1):
        yield {**_sizes(one), "feasible": True, "rank": rank, "first_token_seconds": one.first_token,
               "seconds_per_token": one.per_token, "tokens_per_second": one.tokens_per_second, "bytes": one.bytes,
               "memory": one.memory, "waste": one.plan.layout.waste, "layout": str(one.plan.layout),
               "layers_per_stage": list(one.plan.stages)}
    for name, reason in report.rejected:
        sizes = dict(part.split("=") for part in name.split())
        yield {**{axis: int(size) for axis, size in sizes.items()}, "feasible": False, "reason": reason}


def as_text(report: Report) -> str:
    """For people."""
    request = report.request
    lines = [f"{request.devices} x {request.hardware.name} with {request.device_bytes / 1e9:g} GB, "
             f"{request.batch} sequences of {request.seq_len} tokens", ""]
    if report.feasible:
        lines.append("  data stage tensor   GB/device  first token   per token     tokens/s  padding")
        lines += [f"{one.plan.data:>6}{len(one.plan.stages):>6}{one.plan.tensor:>7}{one.bytes / 1e9:>12.1f}"
                  f"{one.first_token * 1e3:>10.0f} ms{one.per_token * 1e3:>9.2f} ms{one.tokens_per_second:>13,.0f}  "
                  f"{_waste(one)}" for one in report.feasible]
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


def _sizes(one: Predicted) -> dict[str, int]:
    return {"data": one.plan.data, "stage": len(one.plan.stages), "tensor": one.plan.tensor}


def _waste(one: Predicted) -> str:
    found = {name.replace("_", " "): share for name, share in one.plan.layout.waste.items() if share >= 0.0005}
    return ", ".join(f"{name} +{share:.1%}" for name, share in found.items()) or "none"
