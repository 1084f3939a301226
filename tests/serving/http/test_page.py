"""The page of a live server, in a browser."""
import json
import os
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")
HELLO = {"model": "bundled", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")  # its event loop must not outlive this module: others start their own
def browser():
    if not CHROMIUM.exists():
        said = f"the page is tested in Chromium, and there is no {CHROMIUM}: apt-get install chromium"
        pytest.fail(said) if os.environ.get("QWEN_JAX_CI") else pytest.skip(said)
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        yield (chromium := playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET))
        chromium.close()


@pytest.fixture
def page(browser, server):
    """Not yet opened. In ``page.console`` is what it says there, in ``page.asked`` what it has asked for."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.console, page.asked, raised = [], [], []
    page.on("console", lambda message: page.console.append(message.text))
    page.on("pageerror", lambda error: raised.append(str(error)))
    page.on("request", lambda request: page.asked.append(request))
    yield page
    page.close()
    foreign = [request.url for request in page.asked if not request.url.startswith((server.url + "/", "data:"))]
    assert not foreign and not raised


def opened(page, server, max_tokens: str = "12"):
    page.goto(server.url)
    expect(page.locator("#state")).to_have_text("ready")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill(max_tokens)
    return page


def say(page, text: str) -> None:
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator(".busy")).to_have_count(0, timeout=30_000)


def sent(page, path: str) -> list[dict]:
    return [request.post_data_json for request in page.asked if request.url.endswith(path)]


def fact(page, name: str):
    return page.locator("#facts > div", has=page.get_by_text(name, exact=True)).locator("dd")


def generated_tokens(page) -> int:
    return int(re.search(r"([\d,]+) generated", fact(page, "Tokens").text_content())[1].replace(",", ""))


def see(page, hidden: bool) -> None:
    """As when its tab goes to the back, or comes to the front."""
    page.evaluate("""hidden => { Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
                                 document.dispatchEvent(new Event("visibilitychange")); }""", hidden)


def test_an_answer_is_the_apis_own(page, server):
    opened(page, server)
    expect(page.locator("#model option")).to_have_text(["bundled"])
    tokens = generated_tokens(page)
    page.locator("#prompt").fill("hel")
    page.keyboard.press("End")
    page.keyboard.press("Shift+Enter")
    assert page.locator("#prompt").input_value() == "hel\n"
    say(page, "hello")
    whole = server.post("/v1/chat/completions", HELLO).json()
    text, usage = whole["choices"][0]["message"]["content"], whole["usage"]
    assert text and page.locator(".answer").text_content() == text
    meta = page.locator(".meta").text_content()
    assert re.fullmatch(rf"bundled · {whole['choices'][0]['finish_reason']} · {usage['completion_tokens']} tokens "
                        rf"\(prompt {usage['prompt_tokens']}\) · [\d.]+ tokens/s · TTFT \S+ m?s · all \S+ m?s", meta)
    page.get_by_label("System prompt").fill("be brief")
    say(page, "more")
    assert sent(page, "/chat/completions")[1]["messages"] == [
        {"role": "system", "content": "be brief"}, *HELLO["messages"], {"role": "assistant", "content": text},
        {"role": "user", "content": "more"}]
    now = server.wait_until_free()["generated_tokens"]
    assert now > tokens + 2 * usage["completion_tokens"]
    expect(fact(page, "Tokens")).to_contain_text(f" {now:,} generated")
    expect(page.locator("#buckets tr", has_text="decode/full_attention")).not_to_have_count(0)
    assert re.match(r"stop \d|length \d", fact(page, "Answers").text_content())
    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".turn")).to_have_count(0)
    say(page, "hello")
    assert sent(page, "/chat/completions")[2]["messages"][1:] == HELLO["messages"]
    assert page.console == []


def test_stop_ends_the_request(page, server):
    page.route("**/v1/chat/completions", lambda route: route.continue_(post_data=json.dumps(
        {**route.request.post_data_json, "ignore_eos": True})))
    opened(page, server, "900")
    before = server.wait_until_free()
    page.locator("#prompt").fill("hello")
    page.keyboard.press("Enter")
    answer = page.locator(".answer")
    expect(answer).not_to_be_empty(timeout=30_000)
    begun = answer.text_content()
    expect(answer).not_to_have_text(begun)  # it goes on
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".meta")).to_contain_text("stopped")
    stats = server.wait_until_free()
    assert stats["finished"]["abort"] == before["finished"].get("abort", 0) + 1
    assert stats["generated_tokens"] < before["generated_tokens"] + 900
    assert answer.text_content().startswith(begun)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_errors_are_shown(page, server):
    opened(page, server, "0")
    alerts = page.get_by_role("alert")
    say(page, "hello")
    expect(alerts).to_have_text("max_tokens must be at least 1, not 0 (400, invalid_request_error)")
    assert page.locator("#prompt").input_value() == "hello"  # to be sent again
    page.get_by_label("Max tokens").fill("")
    say(page, "a " * 1200)
    expect(alerts.last).to_contain_text("max_seq_len")
    page.get_by_label("Temperature").fill("hot")
    say(page, "hello")
    expect(alerts.last).to_contain_text("temperature")
    assert [len(body["messages"]) for body in sent(page, "/chat/completions")] == [1, 1, 1]


def test_completions_where_there_is_no_chat_template(page, server):
    refusal = {"error": {"message": "this checkpoint has no chat template: use generate", "type": "x"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, json=refusal))
    opened(page, server)
    say(page, "hello")
    page.get_by_role("button", name="Complete texts instead").click()
    expect(page.get_by_label("System prompt")).to_be_hidden()
    say(page, "hello")
    body = {"model": "bundled", "prompt": "hello", "max_tokens": 12, "temperature": 0}
    text = server.post("/v1/completions", body).json()["choices"][0]["text"]
    assert text and page.locator(".answer").last.text_content() == "hello" + text


def test_what_a_model_says_is_never_html(page, server):
    said = '<img src="http://elsewhere.invalid/x" onerror="document.title=1"><script>document.title=2</script>'
    events = "".join(f"data: {json.dumps({'choices': [{'delta': {'content': part}, 'finish_reason': None}]})}\n\n"
                     for part in (said[:20], said[20:]))
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream",
                                                                     body=events + "data: [DONE]\n\n"))
    opened(page, server)
    say(page, "<b>bold</b>")
    assert page.locator(".answer").text_content() == said
    assert page.locator(".mine").text_content() == "<b>bold</b>"
    assert page.locator("#log :is(img, script, b)").count() == 0 and page.title() == "qwen-jax"


def test_a_stream_that_breaks(page, server):
    event = {"choices": [{"delta": {"content": "so f"}, "finish_reason": None}]}
    part, error = (f"data: {json.dumps(one)}\n\n" for one in (event, {"error": {"message": "the engine has stopped"}}))
    bodies = [part, part + error + "data: [DONE]\n\n"]
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream",
                                                                     body=bodies.pop(0)))
    opened(page, server)
    for text in ("the connection was closed before the answer's end", "the engine has stopped"):
        say(page, "hello")
        expect(page.get_by_role("alert").last).to_have_text(text)
        assert page.locator(".answer").last.text_content() == "so f"


def test_keys_and_adapters(page, server):
    def models(route):
        if route.request.headers.get("authorization") != "Bearer sesame":
            route.fulfill(status=401, json={"error": {"message": "a key", "type": "authentication_error"}})
        else:
            route.fulfill(json={"data": [{"id": "bundled", "parent": None}, {"id": "tuned", "parent": "bundled"}]})

    page.route("**/v1/models", models)
    opened(page, server)  # with figures, although the models are not told
    page.get_by_label("API key").fill("sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#model option")).to_have_text(["bundled", "tuned (adapter)"])
    page.get_by_label("Model").select_option("tuned")
    say(page, "hello")
    expect(page.get_by_role("alert")).to_contain_text("'tuned' does not exist")
    chat, = (request for request in page.asked if request.url.endswith("/chat/completions"))
    assert chat.post_data_json["model"] == "tuned" and chat.headers["authorization"] == "Bearer sesame"
    assert page.evaluate("() => [localStorage.length, document.cookie, ...Object.values(sessionStorage)]") == [
        0, "", "sesame"]


def test_figures_come_from_metrics(page, server):
    """Of a scrape that was made up: what is drawn can be computed by hand."""
    made = {"generation_tokens_total": 100, "num_requests_running": 3, "num_requests_waiting": 2, "engine_up": 1,
            "kv_cache_usage_perc": 0.25, "kv_cache_pages_total": 40, "kv_cache_unused_slots_ratio": 0.125,
            "prefix_cache_queries_total": 64, "prefix_cache_hits_total": 48, "compiles_after_warmup": 1,
            'steps_total{bucket="decode 8x1"}': 20, 'step_rows_total{bucket="decode 8x1"}': 50,
            'step_seconds_total{bucket="decode 8x1"}': 3, 'steps_total{bucket="never"}': 0,
            'step_rows_total{bucket="never"}': 0, 'step_seconds_total{bucket="never"}': 0}
    name = "time_to_first_token_seconds_bucket"
    ages = [{**made, **{f'{name}{{le="{le}"}}': 7 + share * age for le, share in (("0.1", 0), ("0.2", 50), ("0.3", 100),
                                                                                  ("+Inf", 100))}} for age in (0, 1)]
    ages[1]["generation_tokens_total"] = 700

    def scrape(route):
        age = ages.pop(0) if len(ages) > 1 else ages[0]
        route.fulfill(body="# HELP\n" + "".join(f"qwen_jax_{key} {number}\n" for key, number in age.items()))

    page.route("**/metrics", scrape)
    opened(page, server)
    ttft = page.locator("#sparks > div", has_text="TTFT").locator("b")
    expect(ttft).to_have_text(["200 ms", "298 ms"])
    expect(page.locator("#pages")).to_have_text("10 of 40, 13 % of slots unused")
    tiles = dict(zip(page.locator("#tiles dt").all_text_contents(), page.locator("#tiles dd").all_text_contents()))
    assert (tiles["Running"], tiles["Waiting"], tiles["Prefix-cache hits"]) == ("3", "2", "75 %")
    shown, seconds = page.evaluate("""() => [$("tiles").children[3].lastChild.textContent,
                                             samples.at(-1).at - before(samples.at(-1), 3).at]""")
    assert seconds > 3.5 or shown == f"{600 / seconds:,.0f}"
    assert page.locator("#buckets td").all_text_contents() == ["decode 8x1", "20", "2.5", "150.0", "100 %"]
    expect(fact(page, "Compiles after warm-up")).to_have_class("bad")
    paths = page.locator("#sparks path").evaluate_all("all => all.map(path => path.getAttribute('d'))")
    assert re.fullmatch(r"M[\d.]+,2h.01(L[\d.]+,2)+", paths[2]) and "NaN" not in "".join(filter(None, paths))


def test_nothing_is_asked_while_nobody_looks(page, server):
    opened(page, server)
    see(page, hidden=True)
    page.wait_for_timeout(300)  # for what was under way
    asked = len(page.asked)
    page.wait_for_timeout(1300)
    assert len(page.asked) == asked
    see(page, hidden=False)
    page.wait_for_timeout(200)
    asked = len(page.asked)
    see(page, hidden=True)
    see(page, hidden=False)
    page.wait_for_timeout(2000)
    assert 1 <= sum(request.url.endswith("/metrics") for request in page.asked[asked:]) <= 3  # not twice a second


def test_state_and_width(page, server):
    page.set_viewport_size({"width": 390, "height": 844})
    opened(page, server)
    assert page.locator("body *").evaluate_all(
        "all => all.filter(one => one.getBoundingClientRect().right > 390).map(one => one.outerHTML)") == []
    refusal = {"error": {"message": "the server is draining", "type": "x"}}
    page.route("**/ready", lambda route: route.fulfill(status=503, json=refusal))
    expect(page.locator("#state")).to_have_text("not ready")
    expect(page.locator("#why")).to_have_text("the server is draining")
    page.route("**/metrics", lambda route: route.abort())
    expect(page.locator("#state")).to_have_text("unreachable")
