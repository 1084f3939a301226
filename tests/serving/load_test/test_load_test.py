"""The load generator, against servers whose delays and faults are known."""
import asyncio
import json
import math
import time
from itertools import count

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port
from live import HERE, Live

from qwen_jax.errors import UserError
from qwen_jax.serving.load_test.client import Outcome, run
from qwen_jax.serving.load_test.report import as_text, check_picture, parse_slo, picture, summarize
from qwen_jax.serving.load_test.workload import Load, arrivals, inputs, parse_rates

SLACK = 0.03  # seconds that a busy machine may add


def event(value) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


PIECE = event({"choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": None}]})
ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "usage": None})
DONE = event(b"[DONE]")


def usage(tokens: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 0}})


async def stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    return response


async def at_once(request: web.Request) -> web.StreamResponse:
    response = await stream(request)
    await response.write(ROLE + PIECE + PIECE + usage(2) + DONE)
    return response


def drive(handler, load: Load, rate: float) -> list[Outcome]:
    """What becomes of the load at a server whose requests ``handler`` answers, in the client's own event loop."""
    async def models(_request):
        return web.json_response({"data": [{"id": "first"}, {"id": "second"}]})

    async def both():
        app = web.Application()
        app.router.add_get("/v1/models", models)
        app.router.add_post("/v1/{kind:chat/completions|completions}", handler)
        async with TestServer(app) as server:
            return await run(str(server.make_url("/v1")), load, rate)

    return asyncio.run(both())


def test_latencies_are_those_of_the_server():
    first, gaps = [], []  # as the server kept them

    async def answer(request):
        came, number = time.perf_counter(), len(first)
        first.append(None)
        response = await stream(request)
        await response.write(ROLE)  # is no token
        times = []
        for wait in (0.05 + 0.004 * number, 0.02, 0.04, 0.02):
            await asyncio.sleep(wait)
            times.append(time.perf_counter())
            await response.write(PIECE)
        first[number] = times[0] - came
        gaps.append(np.diff(times))
        await response.write(usage(7) + DONE)
        return response

    outcomes = drive(answer, Load(requests=24, warmup=0, seed=1), 60)
    found = summarize(outcomes, 60)
    wanted = {"ttft": first, "itl": np.concatenate(gaps), "tpot": [some.sum() / 6 for some in gaps],
              "e2e": [one + some.sum() for one, some in zip(first, gaps)]}
    for name, values in wanted.items():
        for which, value in zip(("p50", "p90", "p99"), np.percentile(values, (50, 90, 99)), strict=True):
            low = value - (SLACK if name in ("itl", "tpot") else 1e-4)  # what begins at the schedule is never shorter
            assert low <= found[f"{name}_ms"][which] / 1e3 <= value + SLACK, (name, which)
    assert found["ttft_ms"]["p99"] - found["ttft_ms"]["p50"] > 35 and found["itl_ms"]["p50"] < 35
    assert found["itl_ms"]["mean"] == pytest.approx(1e3 * np.mean([one for each in outcomes for one in each.gaps]))
    assert found["completed"] == 24 and found["completion_tokens"] == 7 * 24 and found["prompt_tokens"] == 5 * 24
    assert found["output_tokens_per_s"] == pytest.approx(7 * found["completed_per_s"])


def test_a_queue_is_in_the_latency():
    """A server of one request at a time, asked for twice what it can do."""
    service, lock = [], asyncio.Lock()

    async def answer(request):
        async with lock:
            began = time.perf_counter()
            await asyncio.sleep(0.05)
            response = await at_once(request)
            service.append(time.perf_counter() - began)
        return response

    load = Load(requests=24, warmup=0, seed=134)
    times = arrivals(load, 40)
    outcomes = drive(answer, load, 40)
    free, wanted = 0.0, []
    for arrival, seconds in zip(times, service, strict=True):
        free = max(free, arrival) + seconds
        wanted.append(free)
    # In the order in which they ended: on a busy machine two neighbours may change places on their way.
    assert sorted(one.scheduled + one.e2e for one in outcomes) == pytest.approx(wanted, abs=SLACK)
    assert [one.scheduled for one in outcomes] == times.tolist() and max(one.e2e for one in outcomes) > 0.3
    found = summarize(outcomes, 40)
    assert found["completed_per_s"] < 21 < 30 < found["offered_per_s"]


def test_a_client_that_is_late_says_so_and_hides_nothing():
    """The first request stops the event loop that client and server share."""
    ends = []

    async def answer(request):
        if not ends:
            time.sleep(0.4)
        ends.append(time.perf_counter())
        return await at_once(request)

    outcomes = drive(answer, Load(requests=30, warmup=0, seed=1), 100)
    blocked = [one for one in outcomes[1:] if one.scheduled < outcomes[0].scheduled + 0.35]
    late = [outcomes[0].scheduled + 0.4 - one.scheduled for one in blocked]  # at least
    assert all(one.ttft > least and one.e2e > least for one, least in zip(blocked, late, strict=True))
    assert sum(one.lag > least for one, least in zip(blocked, late, strict=True)) > 20
    found = summarize(outcomes, 100)
    assert found["client_lag_ms"]["p99"] > 300 and "bottleneck" in as_text([found])


def test_requests_are_sent_though_earlier_ones_do_not_end():
    """Nobody is answered before all have come: more than aiohttp has connections by default."""
    waiting, everybody = count(1), asyncio.Event()

    async def answer(request):
        if next(waiting) == 150:
            everybody.set()
        await everybody.wait()
        return await at_once(request)

    for rate in (600, math.inf):
        waiting, everybody = count(1), asyncio.Event()
        outcomes = drive(answer, Load(requests=150, warmup=0, timeout=10), rate)
        assert not any(one.error for one in outcomes)
    assert {one.scheduled for one in outcomes} == {0.0}


async def refuse(status):
    return web.json_response({"error": {"message": "no"}}, status=status)


async def cut(request, *pieces, whole=False):
    response = await stream(request)
    for piece in pieces:
        await response.write(piece)
    if not whole:
        request.transport.close()
    return response


FAULTS = {
    "HTTP 429": lambda request: refuse(429), "HTTP 500": lambda request: refuse(500),
    "closed in mid-stream": lambda request: cut(request, ROLE, PIECE, PIECE[:20]),
    "error in the stream": lambda request: cut(request, PIECE, event({"error": {"message": "x"}}), DONE, whole=True),
    "no usage": lambda request: cut(request, PIECE, DONE, whole=True),
    "an event that is none of OpenAI's": lambda request: cut(request, b"data: {half\n\n", DONE, whole=True),
    "timeout": lambda request: asyncio.sleep(2),
}


async def _vanish(request):
    request.transport.close()


def test_failures_are_counted_by_kind_and_are_never_good():
    kinds = ["HTTP 429"] * 3 + [None] * 4 + [*FAULTS, "closed without an answer", "closed in mid-stream"]
    number = count()

    async def answer(request):
        at = next(number)
        if at == len(kinds) - 1:
            return await cut(request, PIECE, usage(1), whole=True)  # politely, but without [DONE]
        if kinds[at] == "closed without an answer":
            return await _vanish(request)
        return await FAULTS.get(kinds[at], at_once)(request)

    outcomes = drive(answer, Load(requests=len(kinds), warmup=0, seed=3, timeout=0.5), 400)
    found = summarize(outcomes, 400, parse_slo("ttft=1e6,tpot=1e6,e2e=1e6"))
    wanted = {kind: kinds.count(kind) for kind in kinds if kind}
    assert found["errors"] == wanted
    assert found["completed"] == 4 and found["requests"] == len(kinds)
    assert found["goodput_share"] == pytest.approx(4 / len(kinds))
    assert found["goodput_per_s"] == pytest.approx(4 / max(one.ended for one in outcomes))
    assert found["completion_tokens"] == 8
    assert "4 x HTTP 429" in as_text([found])


def test_arrivals_are_a_poisson_process():
    rate = 50.0
    gaps = np.diff(arrivals(Load(requests=20_000, seed=5), rate))
    times = arrivals(Load(seconds=400, seed=5), rate)
    for some in (gaps, np.diff(times)):
        assert some.min() >= 0
        assert np.mean(some) == pytest.approx(1 / rate, rel=0.03)
        assert np.var(some) == pytest.approx(1 / rate**2, rel=0.06)
        assert np.mean(some > 1 / rate) == pytest.approx(math.exp(-1), rel=0.03)
    assert times.max() < 400 and len(times) == pytest.approx(20_000, rel=0.03)
    per_second = np.histogram(times, bins=400, range=(0, 400))[0]
    counts = [len(arrivals(Load(seconds=10, seed=seed), 20)) for seed in range(400)]
    for some in (per_second, counts):
        assert np.var(some) / np.mean(some) == pytest.approx(1, abs=0.25)


def test_the_same_seed_is_the_same_load():
    for load in (Load(requests=50, seed=7), Load(seconds=5, seed=7)):
        assert (arrivals(load, 10) == arrivals(load, 10)).all() and inputs(load, 10, 5) == inputs(load, 10, 5)
    load, other, none = Load(requests=50, seed=7), Load(requests=50, seed=8), Load(requests=50)
    assert inputs(load, 10, 5) != inputs(load, 20, 5)  # the prefix cache knows none of another rate's prompts
    assert inputs(load, 10, 5) != inputs(other, 10, 5) and (arrivals(load, 10) != arrivals(other, 10)).any()
    assert (arrivals(none, 10) != arrivals(none, 10)).any() and inputs(none, 10, 1) != inputs(none, 10, 1)
    texts = [one["messages"][0]["content"] for one in inputs(Load(requests=1, words=9, seed=0), 1, 30)]
    assert len(set(texts)) == 30 and {len(text.split()) for text in texts} == {9}


def test_goodput():
    random = np.random.default_rng(0)
    outcomes = []
    for number in range(400):
        scheduled = number / 100
        first, gap, tokens = random.exponential(0.3), random.exponential(0.03), int(random.integers(1, 20))
        pieces = tuple(scheduled + first + gap * at for at in range(tokens))
        outcomes.append(Outcome(scheduled, scheduled, pieces[-1] + 0.001, pieces, 3, tokens,
                                "HTTP 429" if number % 7 == 0 else None))
    for slo in ({"ttft": 250.0}, {"tpot": 25.0}, {"e2e": 400.0}, {"ttft": 300.0, "tpot": 40.0, "e2e": 700.0}):
        good = 0
        for one in outcomes:
            first, last = (one.pieces[0] - one.scheduled) * 1e3, (one.ended - one.scheduled) * 1e3
            each = (one.pieces[-1] - one.pieces[0]) * 1e3 / max(one.completion_tokens - 1, 1)
            good += (not one.error and first <= slo.get("ttft", 1e9) and each <= slo.get("tpot", 1e9)
                     and last <= slo.get("e2e", 1e9))
        found = summarize(outcomes, 100, slo)
        assert 0 < good < found["completed"] and found["goodput_share"] == good / 400
        assert found["goodput_per_s"] == good / max(one.ended for one in outcomes)
    assert "goodput_share" not in summarize(outcomes, 100)
    everything_failed = summarize([outcomes[0]], 100, slo)
    assert everything_failed["ttft_ms"]["p50"] is None and everything_failed["goodput_share"] == 0
    assert "goodput" in as_text([everything_failed]) and json.dumps(everything_failed)


def test_what_is_sent_and_how_it_is_read(tmp_path):
    """Lines end as they like, and events are cut anywhere."""
    seen, headers = [], []
    text = (ROLE + b": a comment\n\n" + PIECE + b"event: x\n" + PIECE.replace(b": ", b":", 1) + usage(2)
            + DONE).replace(b"\n", b"\r\n")

    async def answer(request):
        seen.append(await request.json())
        headers.append(request.headers)
        response = await stream(request)
        for at in range(0, len(text), 11):
            await response.write(text[at:at + 11])
            await asyncio.sleep(0)
        return response

    chats = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "one"}}\n\n{json.dumps({"messages": chats})}\n')
    outcomes = drive(answer, Load(requests=3, warmup=2, prompts=str(path), max_tokens=9, api_key="k"), 50)
    assert len(outcomes) == 3 and not any(one.error for one in outcomes)
    assert {len(one.pieces) for one in outcomes} == {2}
    one = {"model": "first", "max_tokens": 9, "stream": True, "stream_options": {"include_usage": True},
           "messages": [{"role": "user", "content": "one"}]}
    assert seen[2:] == [one, one | {"messages": chats}, one]
    assert {some["Authorization"] for some in headers} == {"Bearer k"}

    seen.clear()
    drive(answer, Load(requests=1, warmup=0, words=3, endpoint="completions", model="mine", ignore_eos=True), 50)
    assert seen[0]["model"] == "mine" and len(seen[0]["prompt"].split()) == 3 and seen[0]["ignore_eos"] is True


@pytest.mark.parametrize("make, said", [
    (lambda: Load(), "either"), (lambda: Load(requests=1, seconds=1), "either"),
    (lambda: Load(requests=0), "requests"), (lambda: Load(seconds=math.nan), "seconds"),
    (lambda: Load(requests=1, words=0), "words"), (lambda: Load(requests=1, max_tokens=-1), "max_tokens"),
    (lambda: Load(requests=1, seed=-1), "seed"), (lambda: Load(requests=1, endpoint="chats"), "endpoint"),
    (lambda: parse_rates("5,x"), "rates"), (lambda: parse_rates("0"), "positive"), (lambda: parse_rates("-1"), "posi"),
    (lambda: parse_rates("nan"), "positive"), (lambda: parse_rates(""), "rates"), (lambda: parse_rates("5,5"), "twice"),
    (lambda: arrivals(Load(requests=1), 0), "positive"), (lambda: arrivals(Load(seconds=1), math.inf), "inf"),
    (lambda: arrivals(Load(seconds=1e-6, seed=0), 1), "no request"),
    (lambda: parse_slo("ttft"), "SLO"), (lambda: parse_slo("ttft=0"), "SLO"), (lambda: parse_slo("itl=5"), "SLO"),
    (lambda: parse_slo("ttft=5,ttft=6"), "SLO"), (lambda: parse_slo("e2e=nan"), "SLO"), (lambda: parse_slo(""), "SLO"),
    (lambda: check_picture("picture.jpg"), "PNG"), (lambda: check_picture("no/such/folder/x.png"), "folder"),
    (lambda: inputs(Load(requests=1, prompts="no/such.jsonl"), 1, 1), "cannot be read"),
    (lambda: asyncio.run(run("localhost:8000", Load(requests=1), 1)), "http://"),
    (lambda: asyncio.run(run(f"http://127.0.0.1:{unused_port()}", Load(requests=1), 1)), "cannot be reached"),
    (lambda: drive(lambda request: refuse(429), Load(requests=1), 1), "warm-up request failed.*HTTP 429.*no"),
])
def test_bad_input(make, said):
    with pytest.raises(UserError, match=said):
        make()


@pytest.mark.parametrize("line, said", [("{", "line 2, must be JSON"), ("3", "line 2, must be"),
                                        ('{"text": ""}', "must be {"), ('{"messages": []}', "only the chat")])
def test_bad_prompts(tmp_path, line, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "one"}}\n{line}\n')
    with pytest.raises(UserError, match=said):
        inputs(Load(requests=1, prompts=str(path), endpoint="completions"), 1, 1)
    path.write_text("\n")
    with pytest.raises(UserError, match="no prompt"):
        inputs(Load(requests=1, prompts=str(path)), 1, 1)


def test_text_and_pictures(tmp_path):
    runs = []
    for rate in (5.0, 10.0, math.inf):
        outcomes = drive(at_once, Load(requests=10, warmup=1, seed=0), 200)
        runs.append((summarize(outcomes, rate, {"ttft": 100.0}), outcomes))
    text = as_text([summary for summary, _ in runs]).splitlines()
    assert text[0].split()[-3:] == ["5.0", "10.0", "inf"] and any(line.startswith("TTFT p99") for line in text)
    for number, some in enumerate((runs, runs[:1], runs[1:])):
        path = tmp_path / f"{number}.png"
        check_picture(path)
        picture(some, path, "a title")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_our_own_server(executable_cache):
    live = Live(worker=str(HERE / "stub_worker.py"))
    try:
        for endpoint in ("chat", "completions"):
            outcomes = asyncio.run(run(live.url, Load(requests=20, max_tokens=8, endpoint=endpoint), 100))
            assert not any(one.error for one in outcomes) and {len(one.pieces) for one in outcomes} == {8}
            assert all(one.completion_tokens for one in outcomes)
    finally:
        live.output()
