"""The schedule policy, the bucket table and the choice of a prefill bucket."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.engine.scheduling.buckets import (
    MAX_BUCKETS,
    STEP_OVERHEAD_TOKENS,
    Bucket,
    Limits,
    bucket_table,
    default_limits,
    pick_prefill,
)
from qwen_jax.engine.scheduling.page_pool import PAGE
from qwen_jax.engine.scheduling.schedule_policy import (
    DEFAULT_POLICY,
    FULL,
    RECOMPUTE,
    SPARSE,
    SchedulePolicy,
    attention_of,
    dynamic_schedule,
)
from qwen_jax.errors import UserError


@pytest.mark.parametrize("batch_size, seq_len, expected", [
    (1, 1, "full_attention"), (32, 2048, "full_attention"),
    (33, 2048, "recompute"), (33, 1, "recompute"), (10_000, 10, "recompute"),
    (1, 2049, "sparse_attention"), (33, 2049, "sparse_attention"), (64, 100_000, "sparse_attention"),
])
def test_the_rule_at_its_thresholds(batch_size, seq_len, expected):
    assert dynamic_schedule(batch_size, seq_len) == expected


def test_the_thresholds_are_data():
    policy = SchedulePolicy(sparse_above_tokens=10, recompute_above_rows=2)
    assert [dynamic_schedule(*case, policy) for case in ((2, 10), (3, 10), (2, 11))] == [FULL, RECOMPUTE, SPARSE]


def test_numpy_integers_are_integers():
    assert dynamic_schedule(np.int32(33), np.int64(5)) == RECOMPUTE


@pytest.mark.parametrize("bad", [0, -1, 1.5, float("nan"), None, "4", True])
def test_bad_sizes_are_refused_by_name(bad):
    with pytest.raises(UserError, match="batch_size must be a positive integer"):
        dynamic_schedule(bad, 10)
    with pytest.raises(UserError, match="seq_len must be a positive integer"):
        dynamic_schedule(1, bad)
    with pytest.raises(UserError, match="recompute_above_rows"):
        SchedulePolicy(recompute_above_rows=bad)
    with pytest.raises(UserError, match="max_seq_len"):
        default_limits(4, bad)


def test_recompute_is_full_attention_and_the_others_are_themselves():
    assert [attention_of(schedule) for schedule in (FULL, RECOMPUTE, SPARSE)] == [FULL, FULL, SPARSE]


def test_the_default_cpu_table():
    full = [*(f"prefill/full_attention {shape}" for shape in ("1x64", "1x256", "1x512", "2x256", "4x128", "8x64")),
            "prefill/recompute 64x64", *(f"decode/full_attention {rows}x1" for rows in (2, 8, 16, 32, 64))]
    assert [str(bucket) for bucket in bucket_table(default_limits())] == full
    assert [str(bucket) for bucket in bucket_table(default_limits(64, 16384))] == [
        *full[:7], *(f"prefill/sparse_attention {shape}" for shape in ("1x64", "1x512")),
        *full[7:], *(f"decode/sparse_attention {rows}x1" for rows in (2, 8, 64))]


def test_engines_keep_full_attention_for_longer_than_the_published_rule():
    assert [dynamic_schedule(1, length, DEFAULT_POLICY) for length in (2049, 8192, 8193)] == [FULL, FULL, SPARSE]
    assert dynamic_schedule(1, 2049) == SPARSE


def test_only_recompute_runs_in_micro_batches():
    table = bucket_table(default_limits(128, 512), precision="f32")
    assert {(b.rows, b.micro_rows) for b in table if b.schedule == RECOMPUTE} == {(64, 8), (128, 8)}
    assert all(b.micro_rows == b.rows for b in table if b.schedule != RECOMPUTE)
    assert {b.precision for b in table} == {"f32"} and {b.pages for b in table} == {8}


@pytest.mark.parametrize("max_batch_size, max_seq_len, platform, threshold", [
    *itertools.product((1, 3, 4, 31, 32, 33, 40, 64, 128, 1024), (1, 64, 65, 700, 2048, 2049, 4096, 8192, 8193, 131072),
                       ("cpu", "gpu", "tpu"), (32,)),
    *itertools.product((1, 4, 5, 100), (64, 4096, 8192), ("cpu", "gpu"), (1, 4, 100)),
])
def test_default_tables_cover_the_policy_and_nothing_else(max_batch_size, max_seq_len, platform, threshold):
    policy = SchedulePolicy(recompute_above_rows=threshold)
    table = bucket_table(default_limits(max_batch_size, max_seq_len, platform, policy), policy)
    prefill = [b for b in table if b.phase == "prefill"]
    decode = [b for b in table if b.phase == "decode"]
    assert len(set(table)) == len(set(map(str, table))) == len(table) <= MAX_BUCKETS
    assert table == tuple(prefill + decode)
    width = -(-max_seq_len // PAGE)
    assert all(b.pages == width and b.tokens <= width * PAGE and b.tokens % PAGE == 0 for b in prefill)
    assert all(b.pages == width and b.tokens == 1 for b in decode)

    attentions = {FULL, SPARSE} if max_seq_len > SchedulePolicy().sparse_above_tokens else {FULL}
    reachable = attentions | ({RECOMPUTE} if max_batch_size > threshold else set())
    assert {b.schedule for b in prefill} == reachable
    assert {b.schedule for b in decode} == attentions
    for bucket in prefill:
        assert (bucket.rows > threshold) == (bucket.schedule == RECOMPUTE)
        assert bucket.micro_rows <= threshold and bucket.rows % bucket.micro_rows == 0
        assert bucket.micro_rows * bucket.tokens <= (512 if platform == "cpu" else 8192)
    for attention in attentions:
        rows = [b.rows for b in decode if b.schedule == attention]
        assert rows == sorted(rows) and rows[0] == 2 and rows[-1] == -(-max_batch_size // 2) * 2


def limits(**changes) -> Limits:
    fields = dict(max_batch_size=8, max_seq_len=512, prefill_shapes=((1, 64), (4, 64)), recompute_shapes=((8, 64, 2),),
                  decode_rows=(4, 8))
    return Limits(**{**fields, **changes})


POLICY = SchedulePolicy(sparse_above_tokens=256, recompute_above_rows=4)


def test_schedules_that_cannot_occur_have_no_buckets():
    assert {b.schedule for b in bucket_table(limits(), POLICY)} == {FULL, SPARSE, RECOMPUTE}
    assert {b.schedule for b in bucket_table(limits(max_batch_size=4), POLICY)} == {FULL, SPARSE}
    assert {b.schedule for b in bucket_table(limits(max_seq_len=256), POLICY)} == {FULL, RECOMPUTE}


def test_shapes_given_twice_become_one_bucket():
    assert bucket_table(limits(decode_rows=(4, 8, 4), prefill_shapes=((4, 64), (1, 64), (4, 64))), POLICY) \
        == bucket_table(limits(), POLICY)


@pytest.mark.parametrize("changes, message", [
    (dict(prefill_shapes=((5, 64),)), "over 4 rows"),
    (dict(recompute_shapes=((4, 64, 2),)), "must have over 4 rows"),
    (dict(recompute_shapes=()), "no recompute shape"),
    (dict(decode_rows=tuple(range(1, 40))), "over 64"),
])
def test_limits_that_do_not_fit_the_policy_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        bucket_table(limits(**changes), POLICY)


@pytest.mark.parametrize("changes, message", [
    (dict(prefill_shapes=((1, 100),)), "multiple of 64"),
    (dict(recompute_shapes=((8, 32, 2),)), "multiple of 64"),
    (dict(prefill_shapes=()), "at least one"),
    (dict(decode_rows=()), "at least one"),
    (dict(max_batch_size=0), "max_batch_size"),
])
def test_malformed_limits_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        limits(**changes)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="platform must be .* not 'cuda'"):
        default_limits(platform="cuda")
    with pytest.raises(UserError, match="precision must be .* not 'fp16'"):
        bucket_table(limits(), POLICY, precision="fp16")
    with pytest.raises(ValueError, match="micro-batches of 3"):
        Bucket("prefill", RECOMPUTE, 8, 64, 4, micro_rows=3)


CPU_PREFILL = [b for b in bucket_table(default_limits()) if (b.phase, b.schedule) == ("prefill", FULL)]


@pytest.mark.parametrize("lengths, expected", [
    ([1], "1x64"), ([64], "1x64"), ([65], "1x64"), ([200], "1x256"), ([300], "1x256"), ([500], "1x512"),
    ([4000], "1x512"), ([60] * 8, "8x64"), ([120] * 4, "4x128"), ([250, 250], "2x256"), ([60, 60], "1x64"),
    ([20, 500], "2x256"),
])
def test_the_bucket_that_pays_most_is_picked(lengths, expected):
    assert str(pick_prefill(CPU_PREFILL, lengths)).split()[1] == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 1500), min_size=1, max_size=12), st.randoms())
def test_no_other_bucket_pays_more(lengths, random):
    shuffled = random.sample(CPU_PREFILL, len(CPU_PREFILL))
    picked = pick_prefill(shuffled, lengths)

    def worth(bucket):
        mask = np.zeros((bucket.rows, bucket.tokens))
        for row, length in zip(mask, lengths, strict=False):
            row[:length] = 1
        return mask.sum() / (mask.size + STEP_OVERHEAD_TOKENS)

    assert worth(picked) == pytest.approx(max(map(worth, CPU_PREFILL)))
    assert picked == next(b for b in shuffled if worth(b) == worth(picked)), "ties go to the first"


def test_picking_from_nothing_is_an_error():
    with pytest.raises(ValueError):
        pick_prefill([], [1])
    with pytest.raises(ValueError):
        pick_prefill(CPU_PREFILL, [])
