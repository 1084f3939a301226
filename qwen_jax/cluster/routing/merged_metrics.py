"""Figures of several engines as if of one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SAMPLE = re.compile(rb"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (.*)$")
ADDED = ("pages_used", "pages_total", "running", "waiting", "prompt_tokens", "generated_tokens", "preemptions",
         "prefix_queries", "prefix_hits", "compiles_after_warmup", "unused_slots", "model_flops", "bytes_read",
         "device_seconds", "host_seconds")


def merged_metrics(texts: Mapping[str, bytes]) -> bytes:
    """Prometheus' text of all engines, whose samples say in a label ``engine`` of which they are."""
    families: dict[bytes, list[bytes]] = {}
    for name, text in texts.items():
        label, family = b'engine="' + name.encode() + b'"', b""
        for line in text.splitlines():
            if line.startswith(b"#"):
                family = line.split(b" ", 3)[2]
                lines = families.setdefault(family, [])
                if line not in lines:
                    lines.append(line)
            elif found := _SAMPLE.match(line):
                metric, labels, value = found.groups()
                both = b",".join(one for one in (label, labels) if one)
                families[family].append(metric + b"{" + both + b"} " + value)
    return b"".join(line + b"\n" for lines in families.values() for line in lines)


def merged_stats(stats: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Those of the first engine, with what adds up added up; and under ``engines`` those of each."""
    each = list(stats.values())
    return {**each[0], **{name: sum(one[name] for one in each) for name in ADDED}, "engines": dict(stats)}
