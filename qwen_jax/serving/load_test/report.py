"""Report on a load test: latencies and rates as figures, a table and a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.serving.load_test.client import Outcome

LATENCIES = ("ttft", "tpot", "itl", "e2e")
SLO = ("ttft", "tpot", "e2e")  # latencies of a request as a whole
MAX_LAG_MS = 50  # with more, the client was measured, not the server


def parse_slo(text: str) -> dict[str, float]:
    """Parse latency limits (an SLO) such as ``ttft=500,tpot=50`` into milliseconds by name; UserError if malformed."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in SLO or name in limits or not 0 < limit < math.inf:
            raise UserError(f"an SLO must be milliseconds for some of {', '.join(SLO)}, such as ttft=500,tpot=50, "
                            f"not {text!r}")
        limits[name] = limit
    return limits


def summarize(outcomes: Sequence[Outcome], rate: float, slo: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return the latencies, rates and failures of a load that was sent at one rate, as the command line prints them.

    Latencies are of whole answers, from their scheduled arrivals: ``{"mean", "p50", "p90", "p99"}`` in ms, None without
    such an answer. Rates are per second: ``offered`` until the last arrival; ``completed``, ``output_tokens`` and
    goodput until the last end. Goodput counts the requests that meet every limit of ``slo``, among all requests,
    including those that failed.
    """
    whole = [outcome for outcome in outcomes if outcome.error is None]
    duration = max(outcome.ended for outcome in outcomes)
    last = max(outcome.scheduled for outcome in outcomes)
    values = {"ttft": [answer.ttft for answer in whole],
              "tpot": [answer.tpot for answer in whole if answer.tpot is not None],
              "itl": [gap for answer in whole for gap in answer.gaps], "e2e": [answer.e2e for answer in whole]}
    tokens = sum(answer.completion_tokens for answer in whole)
    errors = Counter(outcome.error for outcome in outcomes if outcome.error)
    summary = {"rate": rate if math.isfinite(rate) else "inf", "requests": len(outcomes), "completed": len(whole),
             "duration_s": duration, "offered_per_s": len(outcomes) / last if last else None,
             "completed_per_s": len(whole) / duration, "output_tokens_per_s": tokens / duration,
             "prompt_tokens": sum(answer.prompt_tokens for answer in whole), "completion_tokens": tokens,
             **{f"{name}_ms": _statistics(values[name]) for name in LATENCIES},
             "client_lag_ms": _statistics([outcome.lag for outcome in outcomes]),
             "errors": dict(errors.most_common()), "slo_ms": slo}
    if slo:
        good = sum(_meets(answer, slo) for answer in whole)
        summary |= {"goodput_share": good / len(outcomes), "goodput_per_s": good / duration}
    return summary


def _meets(outcome: Outcome, slo: Mapping[str, float]) -> bool:
    """Return whether an answer meets all latency limits. One that came in a single event has no TPOT to exceed."""
    return all((getattr(outcome, name) or 0.0) * 1e3 <= limit for name, limit in slo.items())


def _statistics(seconds: Sequence[float]) -> dict[str, float | None]:
    """Return mean and percentiles (50, 90, 99) in milliseconds of latencies in seconds; all None without any."""
    if not seconds:
        return dict.fromkeys(("mean", "p50", "p90", "p99"))
    p50, p90, p99 = np.percentile(seconds, (50, 90, 99)).tolist()
    return {"mean": float(np.mean(seconds)) * 1e3, "p50": p50 * 1e3, "p90": p90 * 1e3, "p99": p99 * 1e3}


def as_text(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the figures as text, with a column for every rate, and below it failures and warnings."""
    def row(name: str, values: Sequence[float | None], digits: int = 1) -> str:
        return f"{name:26}" + "".join(f"{'-' if value is None else f'{value:,.{digits}f}':>12}" for value in values)

    lines = [f"{'rate (requests/s)':26}" + "".join(f"{str(summary['rate']):>12}" for summary in summaries)]
    for name, key, digits in (("offered (requests/s)", "offered_per_s", 2), ("completed (requests/s)",
                              "completed_per_s", 2), ("output (tokens/s)", "output_tokens_per_s", 1),
                              ("requests", "requests", 0)):
        lines.append(row(name, [summary[key] for summary in summaries], digits))
    lines.append(row("failed", [summary["requests"] - summary["completed"] for summary in summaries], 0))
    if slo := summaries[0]["slo_ms"]:
        lines += [row("goodput (requests/s)", [summary["goodput_per_s"] for summary in summaries], 2),
                  row("goodput (% of requests)", [100 * summary["goodput_share"] for summary in summaries])]
    for name in (*LATENCIES, "client_lag"):
        label = "client's lag" if name == "client_lag" else name.upper()
        lines += [row(f"{label} {which} (ms)", [summary[f"{name}_ms"][which] for summary in summaries], 2)
                  for which in ("mean", "p50", "p90", "p99")]
    if slo:
        lines.append("goodput: " + ", ".join(f"{name.upper()} <= {limit:g} ms" for name, limit in slo.items()))
    for summary in summaries:
        if summary["errors"]:
            lines.append(f"failed at {summary['rate']}: " + ", ".join(f"{count} x {kind}" for kind, count
                                                                      in summary["errors"].items()))
        if (lag := summary["client_lag_ms"]["p99"]) > MAX_LAG_MS:
            lines.append(f"warning: at {summary['rate']} the client sent 1 % of its requests {lag:,.0f} ms late or "
                         "more: it is the bottleneck, and these figures are not the server's alone")
    return "\n".join(lines)


def check_picture(path: str | Path) -> None:
    """Raise UserError unless `picture` can write to ``path``; for use before a load that takes minutes."""
    if Path(path).suffix != ".png" or not Path(path).parent.is_dir():
        raise UserError(f"the picture must be a PNG: a name that ends in .png, in a folder that exists, not {path}")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("a picture needs matplotlib: pip install matplotlib") from error


def picture(runs: Sequence[tuple[Mapping[str, Any], Sequence[Outcome]]], path: str | Path, title: str) -> None:
    """Draw a load test as a PNG: TTFT and E2E distributions for one rate, latencies and goodput by rate for several.

    Args:
      runs: for every rate the figures of `summarize` and the requests' outcomes. The rate ``inf`` has no place on an
        axis of several rates, and is left out there.
    """
    import matplotlib
    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    summaries = [summary for summary, _ in runs if len(runs) == 1 or summary["rate"] != "inf"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    if len(runs) == 1:
        _distributions((left, right), *runs[0])
    else:
        _by_rate(left, right, sorted(summaries, key=lambda summary: summary["offered_per_s"]))
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _distributions(panels: Sequence[Any], summary: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    for panel, name in zip(panels, ("ttft", "e2e"), strict=True):
        values = sorted(getattr(outcome, name) * 1e3 for outcome in outcomes if outcome.error is None)
        panel.step(values, np.arange(1, len(values) + 1) / max(len(values), 1), where="post")
        for which, style in (("p50", ":"), ("p99", "--")) if values else ():
            value = summary[f"{name}_ms"][which]
            panel.axvline(value, color="0.5", lw=1, ls=style, label=f"{which}: {value:,.1f} ms")
        if (summary["slo_ms"] or {}).get(name):
            panel.axvline(summary["slo_ms"][name], color="tab:red", lw=1, label=f"SLO: {summary['slo_ms'][name]:g} ms")
        panel.set(xlabel=f"{name.upper()} from scheduled arrival (ms)", ylabel="share of answers", ylim=(0, 1.02))
        if values:
            panel.legend(loc="lower right", fontsize=8)


def _by_rate(left: Any, right: Any, summaries: Sequence[Mapping[str, Any]]) -> None:
    rates = [summary["offered_per_s"] for summary in summaries]
    for name, color in zip(("ttft", "tpot", "e2e"), ("tab:blue", "tab:orange", "tab:green"), strict=True):
        for which, style in (("p50", "-o"), ("p99", "--o")):
            values = [summary[f"{name}_ms"][which] for summary in summaries]
            left.plot(rates, [math.nan if value is None else value for value in values], style, ms=4, color=color,
                      label=f"{name.upper()} {which}")
    left.set(xlabel="offered (requests/s)", ylabel="ms", yscale="log")
    right.plot(rates, rates, ":", color="0.5", lw=1, label="offered")
    right.plot(rates, [summary["completed_per_s"] for summary in summaries], "-o", ms=4, label="completed")
    if slo := summaries[0]["slo_ms"]:
        limits = ", ".join(f"{name.upper()} ≤ {limit:g} ms" for name, limit in slo.items())
        right.plot(rates, [summary["goodput_per_s"] for summary in summaries], "-o", ms=4, label=f"goodput: {limits}")
    right.set(xlabel="offered (requests/s)", ylabel="requests/s", ylim=(0, None))
    for panel in (left, right):
        panel.legend(fontsize=8)
