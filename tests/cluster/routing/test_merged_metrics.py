"""Tests of the metrics of several engines as one text."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from qwen_jax.cluster.routing.merged_metrics import merged_metrics

disable_created_metrics()


def engine_text(steps: int, more: bool = False) -> bytes:
    registry = CollectorRegistry()
    Counter("qwen_jax_steps", "Steps, by bucket: \\ \n and so on.", ["bucket"], registry=registry
            ).labels('decode "8" \\ {x}, y="z"').inc(steps)
    Counter("qwen_jax_trips", "Never counted.", ["layer"], registry=registry)
    Histogram("qwen_jax_seconds", "From arrival.", registry=registry).observe(0.3)
    Gauge("qwen_jax_ratio", "May be nothing.", registry=registry).set(float("nan"))
    if more:
        Gauge("qwen_jax_memory", "Of one engine alone.", registry=registry).set(7)
    return generate_latest(registry)


def families(text: bytes) -> dict:
    """Return type, help and samples of every family, as Prometheus reads them."""
    return {family.name: (family.type, family.documentation,
                          {(sample.name, *sorted(sample.labels.items()), repr(sample.value))
                           for sample in family.samples})
            for family in text_string_to_metric_families(text.decode())}


def test_every_sample_says_its_engine_and_nothing_else_changes():
    texts = {"engine-0": engine_text(3), "engine-1": engine_text(4, more=True)}
    merged = merged_metrics(texts)
    expected: dict = {}
    for engine, text in texts.items():
        for name, (kind, documentation, samples) in families(text).items():
            labelled = {(sample, *sorted([*labels, ("engine", engine)]), value) for sample, *labels, value in samples}
            expected.setdefault(name, (kind, documentation, set()))[2].update(labelled)
    assert families(merged) == expected and len(expected) == 5
    lines = merged.decode().splitlines()
    assert len([line for line in lines if line.startswith("# TYPE")]) == 5
    assert 'qwen_jax_memory{engine="engine-1"} 7.0' in lines
