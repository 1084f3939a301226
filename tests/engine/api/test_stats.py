"""Stats of several engines as the stats of one."""
from dataclasses import fields, is_dataclass

import pytest

from qwen_jax.cluster.routing.merged_metrics import merged_stats
from qwen_jax.engine.api.stats import BucketStats, EngineStats, merge_stats, stats_as_dict

FIRST = {"weight_version", "tuned", "adaptation"}  # belongs to each engine; those of all stand under "engines"
LARGEST = {"warmup_seconds"}


def bucket(name, scale):
    return BucketStats(name, steps=scale, rows=2 * scale, tokens=3 * scale, seconds=0.5 * scale, prepare_seconds=scale,
                       from_disk=scale > 1, temp_bytes=100 * scale)


def stats(scale):
    """Stats in which every field has a value of its own, ``scale`` times that of the first engine."""
    values = {}
    for place, field in enumerate(fields(EngineStats), 1):
        values[field.name] = place * scale
    return EngineStats(**values | {
        "finished": {"stop": 3 * scale, f"only {scale}": 1}, "schedules": {"full_attention": 4 * scale},
        "guard_trips": {0: scale, 7 + scale: 2}, "tuned": f"file {scale}", "adaptation": {"a": {"b": float(scale)}},
        "buckets": (bucket("shared", scale), bucket(f"own {scale}", scale)), "adapters": (f"adapter {scale}", "both")})


def test_every_field_is_merged_by_its_rule():
    merged = merge_stats([stats_as_dict(stats(1)), stats_as_dict(stats(10))])
    one = stats_as_dict(stats(1))
    assert set(merged) == set(one)  # nothing is lost
    for field in fields(EngineStats):
        before, after = one[field.name], merged[field.name]
        if field.name in FIRST:
            assert after == before, field.name
        elif field.name in LARGEST:
            assert after == 10 * before, field.name
        elif isinstance(before, int | float):
            assert after == 11 * before, field.name
        else:
            assert field.name in ("finished", "schedules", "guard_trips", "buckets", "adapters")
    assert merged["finished"] == {"stop": 33, "only 1": 1, "only 10": 1}
    assert merged["schedules"] == {"full_attention": 44}
    assert merged["guard_trips"] == {0: 11, 8: 2, 17: 2}
    assert merged["adapters"] == ("adapter 1", "adapter 10", "both")
    by_name = {bucket["bucket"]: bucket for bucket in merged["buckets"]}
    assert by_name.keys() == {"shared", "own 1", "own 10"}
    assert by_name["shared"] == {"bucket": "shared", "steps": 11, "rows": 22, "tokens": 33, "seconds": 5.5,
                                 "prepare_seconds": 10, "from_disk": False, "temp_bytes": 1000}


def test_a_ratio_is_that_of_the_sums():
    engines = [stats_as_dict(stats(1)) | {"sparse_pages_read": 1, "sparse_pages_visible": 10},
               stats_as_dict(stats(1)) | {"sparse_pages_read": 45, "sparse_pages_visible": 50}]
    assert merge_stats(engines)["sparse_density"] == pytest.approx(46 / 60)
    assert merge_stats([one | {"sparse_pages_visible": 0} for one in engines])["sparse_density"] == 1.0


@pytest.mark.parametrize("kind", [EngineStats, BucketStats])
def test_every_field_has_a_rule(kind):
    assert is_dataclass(kind) and all(callable(field.metadata.get("merge")) for field in fields(kind))


def test_a_cluster_reports_all_engines_together_and_each_alone():
    each = {"engine-0": stats_as_dict(stats(1)), "engine-1": stats_as_dict(stats(2))}
    merged = merged_stats(each)
    assert merged["engines"] == each and merged["accepted_tokens"] == 3 * each["engine-0"]["accepted_tokens"]
