"""Sparse attention: summaries against brute force, every implementation against a mask over full attention, and what
selection promises: the same pages in one chunk or many, rows that do not matter to one another, needles found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_kernels.attention import PAGE, page_dtype, paged_attention
from qwen_kernels.attention.storage import to_storage
from qwen_kernels.sparse_attention import (
    SELECTORS,
    Sparsity,
    attend,
    new_summaries,
    select,
    sparse_attention,
    update_summaries,
    visible_pages,
)

KV_HEADS, GROUP, DIM = 2, 3, 16
sparse_attention = jax.jit(sparse_attention, static_argnames=("sparsity", "implementation"))  # eager, operations
select = jax.jit(select, static_argnums=7)  # compile singly, for minutes
attend = jax.jit(attend)
update_summaries = jax.jit(update_summaries, static_argnums=5)


class Cache:
    """Rows of random keys and values on pages scattered over the pool; unwritten positions hold NaN."""

    def __init__(self, lengths, width, seed=0, dtype=jnp.float32):
        rng = np.random.default_rng(seed)
        rows, pages = len(lengths), 1 + len(lengths) * width
        self.width, self.length = width, jnp.asarray(lengths, jnp.int32)
        self.table = jnp.asarray(rng.permutation(np.arange(1, pages)).reshape(rows, width), jnp.int32)
        self.k, self.v = rng.standard_normal((2, rows, width * PAGE, KV_HEADS, DIM)).astype(np.float32)
        for b, length in enumerate(lengths):
            self.k[b, length:] = self.v[b, length:] = np.nan
        self.dtype, self.prompt_length = dtype, self.length
        self.put()

    def put(self):
        def pages(values):
            array = np.full((1 + self.table.size, KV_HEADS, PAGE, DIM), np.nan, np.float32)
            array[np.asarray(self.table)] = values.reshape(len(values), self.width, PAGE, KV_HEADS, DIM).swapaxes(2, 3)
            return to_storage(jnp.asarray(array, self.dtype), page_dtype(self.dtype))

        self.k_pages, self.v_pages = pages(self.k), pages(self.v)
        zero = jnp.zeros(len(self.length), jnp.int32)
        self.summaries = update_summaries(new_summaries(self.k_pages, self.width), self.k_pages, self.table, zero,
                                          self.length, self.width * PAGE)

    def run(self, q, start, sparsity, **options):
        return sparse_attention(q.astype(self.dtype), self.k_pages, self.v_pages, self.summaries, self.table,
                                jnp.asarray(start, jnp.int32), self.length, self.prompt_length, sparsity=sparsity,
                                **options)

    def select(self, q, start, sparsity):
        return select(q, self.k_pages, self.summaries, self.table, jnp.asarray(start, jnp.int32), self.length,
                      self.prompt_length, sparsity)


def queries(rows, tokens, seed=1, scale=3.0):
    return scale * jax.random.normal(jax.random.key(seed), (rows, tokens, KV_HEADS, GROUP, DIM))


def real(cache, start, tokens):
    return (np.asarray(start)[:, None] + np.arange(tokens)) < np.asarray(cache.length)[:, None]


# --- summaries

def mean_and_deviation(keys):
    """Return means and standard deviations ``[K, 2, H]`` of keys ``[K, tokens, H]``, in float64."""
    keys = keys.astype(np.float64)
    return np.stack([keys.mean(1), keys.std(1)], 1)


def test_summaries_are_mean_and_deviation_of_their_keys():
    cache = Cache([80 * PAGE - 10, 3000], 80)
    nodes = np.asarray(cache.summaries)
    assert nodes.shape[2] == 6, "four leaves, a page, one level above"
    for b, length in enumerate(cache.length.tolist()):
        for n in range(-(-length // PAGE)):
            keys = cache.k[b, n * PAGE:min((n + 1) * PAGE, length)].swapaxes(0, 1)
            page = nodes[cache.table[b, n]]
            np.testing.assert_allclose(page[:, 4], mean_and_deviation(keys), atol=1e-5)
            for leaf in range(-(-keys.shape[1] // 16)):
                some = keys[:, 16 * leaf:16 * leaf + 16]
                np.testing.assert_allclose(page[:, leaf], mean_and_deviation(some), atol=1e-5)
        for n in range(length // (4 * PAGE)):
            keys = cache.k[b, n * 4 * PAGE:(n + 1) * 4 * PAGE].swapaxes(0, 1)
            node = nodes[cache.table[b, 4 * n + 3], :, 5]
            np.testing.assert_allclose(node, mean_and_deviation(keys), atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, PAGE, 3 * PAGE])
def test_summaries_do_not_depend_on_the_chunks(chunk):
    """Chunks of a token as in decode, of a few as when drafts are checked, of pages as in a prefill."""
    cache = Cache([300, 70 * PAGE], 70)
    again, begin = new_summaries(cache.k_pages, cache.width), 66 * PAGE if chunk < PAGE else 0
    if begin:
        again = update_summaries(again, cache.k_pages, cache.table, jnp.zeros(2, jnp.int32), jnp.array([300, begin]),
                                 begin)
    for start in range(begin, cache.width * PAGE, chunk):
        length = jnp.minimum(cache.length, start + chunk)
        again = update_summaries(again, cache.k_pages, cache.table, jnp.array([min(start, 256), start]), length, chunk)
    np.testing.assert_array_equal(np.asarray(again)[1:], np.asarray(cache.summaries)[1:])


# --- attention

@pytest.mark.parametrize("name, tokens", [("pyramid", 4 * PAGE), ("window", 4 * PAGE), ("pyramid", 3), ("strided", 1)])
def test_gathering_equals_masking(name, tokens):
    cache = Cache([30 * PAGE - 10, 19 * PAGE + 1, 0], 30)
    start = [26 * PAGE, 18 * PAGE, 0]
    if tokens < PAGE:
        start = [30 * PAGE - 10 - tokens, 19 * PAGE + 1 - tokens, 0]
        cache.prompt_length = jnp.asarray(start)  # what is being answered is not the end of the prompt
    q = queries(3, tokens)
    sparsity = Sparsity(name, budget=1.0, dense_tail=20)
    got, selection = cache.run(q, start, sparsity)
    want, _ = cache.run(q, start, sparsity, implementation="reference")
    shown = real(cache, start, tokens)
    assert selection.count.max() < 30 or tokens >= PAGE, "something must be left out"
    np.testing.assert_allclose(np.asarray(got)[shown], np.asarray(want)[shown], atol=1e-5)
    assert not np.any(np.asarray(got)[2]) and not np.any(np.asarray(selection.count)[2]), "a padding row"


def test_bfloat16_stays_close_to_float32():
    exact, half = Cache([20 * PAGE], 20), Cache([20 * PAGE], 20, dtype=jnp.bfloat16)
    selection = exact.select(queries(1, PAGE), [19 * PAGE], Sparsity(dense_tail=0))
    where = exact.table, jnp.array([19 * PAGE]), exact.length, selection
    want = attend(queries(1, PAGE), exact.k_pages, exact.v_pages, *where)
    got = attend(queries(1, PAGE).astype(jnp.bfloat16), half.k_pages, half.v_pages, *where)
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want), atol=0.05)


@pytest.mark.parametrize("tokens, pages", [(2 * PAGE, 20), (1, 20), (1, 210)])
def test_a_budget_for_all_pages_is_full_attention(tokens, pages):
    cache = Cache([pages * PAGE], pages)
    start = jnp.array([pages * PAGE - tokens])
    cache.prompt_length = start
    got, selection = cache.run(queries(1, tokens), start, Sparsity(budget=30.0))
    want = paged_attention(queries(1, tokens), cache.k_pages, cache.v_pages, cache.table, start, cache.length)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert int(selection.count.sum()) == KV_HEADS * int(visible_pages(tokens, start, cache.length)[0])


def test_nan_in_one_row_stays_there():
    cache = Cache([20 * PAGE, 20 * PAGE], 20)
    start, q = [16 * PAGE] * 2, queries(2, 4 * PAGE)
    want, _ = cache.run(q, start, Sparsity())
    cache.k[0, 19 * PAGE] = np.nan
    cache.put()
    got, _ = cache.run(q, start, Sparsity())
    assert np.isnan(np.asarray(got[0, 3 * PAGE:])).any(), "it must not look like an answer"
    np.testing.assert_array_equal(got[1], want[1])


# --- selection

@pytest.mark.parametrize("name", [name for name in SELECTORS if name not in ("window", "mean_pooled")])
def test_a_needle_is_found(name):
    """Find a single key far away that a single query of a block looks for, among random keys."""
    cache = Cache([100 * PAGE], 100)
    q, place = queries(1, PAGE, scale=1.0), 37
    cache.k[0, place * PAGE + 20, 1] = 4 * q[0, 5, 1, 2]
    cache.put()
    places = np.asarray(cache.select(q, [99 * PAGE], Sparsity(name, dense_tail=0)).places)
    assert place in places[0, 0, 1] and place not in places[0, 0, 0], "by the head that looks for it alone"


def test_reranked_finds_single_keys_that_estimates_hide():
    cache, q, found = Cache([100 * PAGE], 100), queries(1, PAGE, scale=1.0), {"pyramid": 0, "reranked": 0}
    plain = cache.k.copy()
    for place in (7, 23, 37, 55, 71, 90):
        cache.k[:] = plain
        cache.k[0, place * PAGE + 20, 1] = 2 * q[0, 5, 1, 2]
        cache.put()
        for name in found:
            places = np.asarray(cache.select(q, [99 * PAGE], Sparsity(name, dense_tail=0)).places)
            found[name] += place in places[0, 0, 1]
    assert found["pyramid"] < found["reranked"] == 6, found


def test_pyramid_that_opens_everything_chooses_as_flat_scoring(monkeypatch):
    monkeypatch.setattr("qwen_kernels.sparse_attention.pyramid.BY_LEAVES", 100)
    cache = Cache([100 * PAGE], 100)
    wide, q = Sparsity("pyramid", budget=6.0, dense_tail=0), queries(1, PAGE)
    pyramid, flat = (cache.select(q, [99 * PAGE], Sparsity(name, wide.budget, dense_tail=0)) for name in
                     ("pyramid", "flat"))
    assert int(pyramid.count[0, 0, 0]) < 60
    np.testing.assert_array_equal(pyramid.places, flat.places)


def test_pyramid_chooses_nearly_as_flat_scoring_when_it_opens_few():
    cache = Cache([256 * PAGE], 256)
    q = queries(1, 4 * PAGE)
    pyramid, flat = (np.asarray(cache.select(q, [252 * PAGE], Sparsity(name, dense_tail=0)).places)
                     for name in ("pyramid", "flat"))
    shared = [len(set(a) & set(b)) / len(a) for a, b in zip(pyramid.reshape(8, -1), flat.reshape(8, -1), strict=True)]
    assert np.mean(shared) > .6, "random keys are the worst case: every node looks alike"


def test_what_is_always_taken():
    cache = Cache([40 * PAGE - 5], 40)
    sparsity = Sparsity(budget=1.0, sink=2, local=3, dense_tail=70)
    selection = cache.select(queries(1, 8 * PAGE), [32 * PAGE], sparsity)
    for block in range(8):
        own = 32 + block
        for head in range(KV_HEADS):
            places = np.asarray(selection.places)[0, block, head]
            count = int(selection.count[0, block, head])
            places = np.arange(count) if selection.dense[0, block, head] else places[:count]
            assert {0, 1, own, own - 1, own - 2} <= set(places.tolist()) and places.max() == own
            assert (np.diff(places) > 0).all()
    dense = np.asarray(selection.dense)[0]
    assert dense.tolist() == [[False] * 2] * 6 + [[True] * 2] * 2, "70 tokens before 40 * 64 - 5"
    assert np.asarray(selection.count)[0, :6, 0].tolist() == [5 + 5] + [5 + 6] * 5, "log2 of 32 to 37, rounded up"


def test_dense_heads_attend_to_everything():
    cache, q, start = Cache([20 * PAGE], 20), queries(1, 2 * PAGE), jnp.array([18 * PAGE])
    got, selection = cache.run(q, start, Sparsity(dense_tail=0, dense_heads=(1,)))
    sparse, chosen = cache.run(q, start, Sparsity(dense_tail=0))
    full = paged_attention(q, cache.k_pages, cache.v_pages, cache.table, start, cache.length)
    np.testing.assert_allclose(got[:, :, 1], full[:, :, 1], atol=1e-6)
    np.testing.assert_array_equal(got[:, :, 0], sparse[:, :, 0])
    sparse_counts = np.asarray(chosen.count)[0, :, 0]
    assert np.asarray(selection.count)[0].tolist() == [[sparse_counts[0], 19], [sparse_counts[1], 20]]


@pytest.mark.parametrize("name", ["pyramid", "strided"])
def test_selection_is_the_same_in_chunks(name):
    cache, start = Cache([24 * PAGE - 30], 24), 16 * PAGE
    q, sparsity = queries(1, 8 * PAGE), Sparsity(name, budget=1.0)
    whole = cache.select(q, [start], sparsity)
    for chunk in (PAGE, 4 * PAGE):
        for begin in range(0, 8 * PAGE, chunk):
            part = cache.select(q[:, begin:begin + chunk], [start + begin], sparsity)
            blocks = slice(begin // PAGE, (begin + chunk) // PAGE)
            for in_chunks, at_once in zip(part, whole, strict=True):
                np.testing.assert_array_equal(in_chunks, at_once[:, blocks])


def test_drafts_select_as_one_token_after_another_would():
    cache, q = Cache([24 * PAGE + 40], 25), queries(1, 3)
    cache.prompt_length = jnp.array([1000])
    together = cache.select(q, [24 * PAGE + 37], Sparsity(budget=1.0))
    for token in range(3):
        alone = cache.select(q[:, token:token + 1], [24 * PAGE + 37 + token], Sparsity(budget=1.0))
        np.testing.assert_array_equal(alone.places[:, 0], together.places[:, token])


def test_ranks_by_keys_do_not_depend_on_the_chunk():
    """Blocks beyond 64 pages rank by keys, those before do not, though one program computes both."""
    cache, q = Cache([80 * PAGE], 80), queries(1, 8 * PAGE)
    together = cache.select(q, [60 * PAGE], Sparsity("reranked", budget=1.0))
    for block in range(8):
        alone = cache.select(q[:, block * PAGE:(block + 1) * PAGE], [(60 + block) * PAGE],
                             Sparsity("reranked", budget=1.0))
        np.testing.assert_array_equal(alone.places[:, 0], together.places[:, block])


def test_keys_are_gathered_a_few_pages_at_a_time(monkeypatch):
    cache, q, sparsity = Cache([80 * PAGE, 75 * PAGE], 80), queries(2, 1), Sparsity("reranked", budget=1.0)
    cache.prompt_length = jnp.zeros(2, jnp.int32)
    start = jnp.array([80 * PAGE - 1, 75 * PAGE - 1])
    whole = cache.select(q, start, sparsity)
    arrays = q, cache.k_pages, cache.summaries, cache.table, start, cache.length, cache.prompt_length
    for pages, others in ((21, 5), (5, 21)):
        monkeypatch.setattr("qwen_kernels.sparse_attention.pyramid.KEY_BYTES", pages * 2 * KV_HEADS * PAGE * DIM * 4)
        found = jax.jit(lambda *arrays: select.__wrapped__(*arrays, sparsity)).trace(*arrays)
        shapes = [f"f32[2,{KV_HEADS},{count},{PAGE},{DIM}]" in str(found.jaxpr) for count in (pages, others)]
        assert shapes == [True, False]
        np.testing.assert_array_equal(found.lower().compile()(*arrays).places, whole.places)


def test_rows_do_not_matter_to_one_another():
    both, tokens = Cache([24 * PAGE, 700], 24), 4 * PAGE
    q = queries(2, tokens)
    got, selection = both.run(q, [20 * PAGE, 8 * PAGE], Sparsity(budget=1.0))
    both.length = jnp.array([24 * PAGE, 0], jnp.int32)
    alone, chosen = both.run(q, [20 * PAGE, 0], Sparsity(budget=1.0))
    np.testing.assert_array_equal(got[0], alone[0])
    np.testing.assert_array_equal(selection.places[0], chosen.places[0])


def test_threshold_leaves_out_what_hardly_counts():
    cache = Cache([40 * PAGE], 40)
    counts = [int(cache.select(queries(1, PAGE), [39 * PAGE], Sparsity(threshold=share, dense_tail=0)).count.sum())
              for share in (0.0, 0.03, 1.0)]
    assert counts[0] > counts[1] > counts[2] == KV_HEADS * 3, "a share of one leaves what is always taken"


def test_bad_input_is_refused():
    cache = Cache([4 * PAGE], 4)
    for options, message in (({"selector": "best"}, "selector must be one of pyramid, .*, not 'best'"),
                             ({"local": 0}, "local must be at least 1, not 0"),
                             ({"budget": -1.0}, "budget must be 0 or more, not -1.0")):
        with pytest.raises(ValueError, match=message):
            Sparsity(**options)
    with pytest.raises(ValueError, match="implementation must be one of xla, reference, or None, not 'cuda'"):
        cache.run(queries(1, PAGE), [0], Sparsity(), implementation="cuda")
    with pytest.raises(ValueError, match="does not match pages"):
        cache.run(queries(1, PAGE)[..., :8], [0], Sparsity())
