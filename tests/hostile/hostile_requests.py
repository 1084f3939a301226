"""Hostile requests by kind, made from random numbers: bodies, addresses, headers, and connections that misbehave.

`KINDS` is used in a short form by ``test_hostile_requests.py`` and for thousands of requests by
``scripts/bench/hostile.py``. The server has the options of ``serving/served.py``.
"""

from __future__ import annotations

import json
import random

from grammar_fuzz import ambiguous, count, damaged, intersection, pattern, random_schema, reference_chain, rule_chain
from hostile_client import CHAT, COMPLETIONS, EMBEDDINGS, HELLO, LOAD, SHORT, UNLOAD, VALID, Hostile, Kind, post
from hostile_connections import CONNECTIONS

from qwen_jax.serving.http import protocol

FIELDS = {COMPLETIONS: protocol.CompletionRequest, CHAT: protocol.ChatRequest, EMBEDDINGS: protocol.EmbeddingRequest,
          "/tokenize": protocol.TokenizeRequest, "/score": protocol.ScoreRequest, "/classify": protocol.ClassifyRequest,
          "/detokenize": protocol.DetokenizeRequest, LOAD: protocol.AdapterRequest, UNLOAD: protocol.AdapterRequest}
ODD = (None, True, False, 0, -1, 1.5, "", "x", "1", [], [[]], [None], {}, {"": {}}, {"x": [1]}, [1, "a"], [True],
       ["", ""], [0.5], [{"role": "user"}], "null", ["a"] * 300, {"type": "text"}, [[1], "a"], [[], [1]])
NUMBERS = ("1e400", "-1e400", "NaN", "Infinity", "-Infinity", "-0", "-0.0", "1e-400", "5e-324", "1e-46", "1e39",
           "3.5e38", "2147483647", "2147483648", "-2147483649", "9223372036854775807", "9223372036854775808",
           "-9223372036854775809", "18446744073709551615", "18446744073709551616", "1" * 5000, "0." + "9" * 5000,
           "1" + "0" * 400, "1E+2", "0x10", "01", "+1", "1.", ".5", "true", '"5"', "1e5", "-1", "0", "2", "129", "1e0")
NUMERIC = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "presence_penalty",
           "frequency_penalty", "repetition_penalty", "logprobs", "priority", "timeout", "best_of", "top_logprobs",
           "max_completion_tokens", "dimensions", "stop_token_ids", "prompt", "logit_bias", "tokens", "input")
CONTROL = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<tool_call>", "</tool_call>",
           "<|im_end|>\n<|im_start|>system\n", "<|im_", "<think>", "{{ messages }}", "{% raw %}", "\x00")
UNICODE = ("\ud800", "\udfff\ud800", "\x00", "\u202e", "\ufeff", "\ufffe", "e" + "\u0301" * 300, "\ufdfa" * 60,
           "\U0001f469\u200d" * 50, "\ue000\uf8ff", "\u1100\u1161\u11a8" * 40, "\U0010ffff", "\u0130" * 40, "\ufb01",
           "\r\n\u2028", "\x7f\x1b[2J")
PATHS = ("/usr", "/", "..", "../..", ".", "", "/proc/self/root", "/proc/self/fd/0", "/dev/zero", "/dev/stdin",
         "/etc/passwd", "~", "a\0b", "x" * 4096, "x/" * 2000, "\udcff", "file:///etc", "http://localhost/", "//usr",
         "/tmp/../usr", "C:\\", "%2e%2e", "/dev/fd/0", "none\n", "../" * 1000, "/sys", "*", "$HOME", "`id`",
         "/proc/1/environ")


def wrong_items(rng: random.Random, n: int) -> Hostile:
    """Return a request with a list, or an object, of ``n`` parts that are all wrong."""
    item = rng.choice((1.5, {}, [], None, "a", {"type": "text"}, {"role": 1}))
    path, field = rng.choice([(COMPLETIONS, "prompt"), (COMPLETIONS, "stop"), (COMPLETIONS, "stop_token_ids"),
                              (COMPLETIONS, "guided_choice"), (CHAT, "messages"), (CHAT, "tools"),
                              (EMBEDDINGS, "input"), ("/classify", "labels"), ("/detokenize", "tokens"),
                              ("/score", "continuation")])
    message = {"role": "user", "content": [item] * n}
    parts = dict.fromkeys(range(n // 2), item)
    return rng.choice([lambda: post(path, {**VALID[path], field: [item] * n}),
                       lambda: post(COMPLETIONS, {**VALID[COMPLETIONS], "logit_bias": parts}),
                       lambda: post(CHAT, {**VALID[CHAT], "messages": [message]}),
                       lambda: post(CHAT, {**VALID[CHAT], "messages": [parts]})])()


def sizes(rng: random.Random) -> Hostile:
    """Return a request in which a text, a list or the body itself is long."""
    n = count(rng, 1_000_000)
    few = count(rng, 3000)
    return rng.choice([
        lambda: post(COMPLETIONS, {**SHORT, "prompt": "a " * n}),
        lambda: post(COMPLETIONS, {**SHORT, "prompt": [5] * n}),
        lambda: post(COMPLETIONS, {**SHORT, "prompt": " " * n + "\u0301"}),
        lambda: post(CHAT, {**SHORT, "messages": HELLO * few}),
        lambda: post(CHAT, {**SHORT, "messages": [{"role": "user", "content": "a" * n}]}),
        lambda: post(CHAT, {**SHORT, "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * few}]}),
        lambda: post(COMPLETIONS, {**SHORT, "model": "m" * n, "prompt": "a"}),
        lambda: post(COMPLETIONS, {**SHORT, "prompt": "a", "f" * n: 1}),
        lambda: post(COMPLETIONS, {**SHORT, "prompt": "a", "user": "u" * n}),
        lambda: post(COMPLETIONS, {**SHORT, "prompt": "a", **{f"f{i}": i for i in range(few)}}),
        lambda: post(COMPLETIONS, {**SHORT, "prompt": "a", "stop": ["s" * few] * rng.randint(1, 20)}),
        lambda: post(COMPLETIONS, {**SHORT, "prompt": "a", "stop": "s" * n}),
        lambda: post(COMPLETIONS, {**SHORT, "prompt": "a", "stop_token_ids": list(range(few))}),
        lambda: post(COMPLETIONS, {**SHORT, "prompt": "a", "logit_bias": {str(i): 1 for i in range(few)}}),
        lambda: post(COMPLETIONS, {**SHORT, "prompt": "a", "cache_salt": "s" * few, "logit_bias": {"1" * few: 1}}),
        lambda: post(EMBEDDINGS, {"model": "bundled", "input": "a " * n, "encoding_format": "base64"}),
        lambda: post("/classify", {"model": "bundled", "input": ["a"] * few, "labels": ["x" * few, "y"]}),
        lambda: post("/tokenize", {"prompt": "a " * n}), lambda: post("/detokenize", {"tokens": [300] * n}),
        lambda: wrong_items(rng, n),
        lambda: post(COMPLETIONS, b"[" + b"1," * n + b"1]"), lambda: post(COMPLETIONS, b" " * 6 * n)])()


def depths(rng: random.Random) -> Hostile:
    """Return a request in which brackets stand in brackets."""
    n = count(rng, 100_000)
    begin, end = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"items":', "}]"), ('{"properties":{"a":', "}}")))
    deep = begin * n + rng.choice(("1", "{}", "[]", '"a"')) + end * rng.choice((n, n, 0))
    path = rng.choice((COMPLETIONS, CHAT))
    field = rng.choice((*FIELDS[path].model_fields, "user", "metadata"))
    body = json.dumps({**VALID[path], field: "@"}).replace('"@"', deep)
    tool = {"type": "function", "function": {"name": "f", "parameters": "@"}}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": deep}}]}
    return rng.choice([lambda: post(path, body.encode()), lambda: post(rng.choice(list(VALID)), deep.encode()),
                       lambda: post(CHAT, json.dumps({**VALID[CHAT], "tools": [tool]}).replace('"@"', deep).encode()),
                       lambda: post(CHAT, {**SHORT, "messages": [call]})])()


def types(rng: random.Random) -> Hostile:
    """Return a request with fields of odd types."""
    path = rng.choice(list(VALID))
    fields = rng.sample(list(FIELDS[path].model_fields), rng.randint(1, 2))
    return post(path, {**VALID[path], **{field: rng.choice(ODD) for field in fields}})


def numbers(rng: random.Random) -> Hostile:
    """Return a request with a number at or beyond an edge, in every form that JSON knows and some that it does not."""
    path = rng.choice((COMPLETIONS, COMPLETIONS, CHAT, "/detokenize", EMBEDDINGS))
    field, number = rng.choice(NUMERIC), rng.choice(NUMBERS)
    value = {"stop_token_ids": f"[{number}]", "prompt": f"[{number}]", "tokens": f"[{number}]", "input": f"[{number}]",
             "logit_bias": rng.choice((f'{{"7": {number}}}', f'{{"{number}": 1}}'))}.get(field, number)
    changed = {**VALID[path], "temperature": rng.choice((0, 1)), field: "@"} if path in (COMPLETIONS, CHAT) else {
        **VALID[path], field: "@"}
    return post(path, json.dumps(changed).replace('"@"', value).encode())


def unicode(rng: random.Random) -> Hostile:
    """Return a request with odd characters, or with bytes that are none."""
    path = rng.choice(list(VALID))
    text = "".join(rng.choices(UNICODE + CONTROL + ("a", " "), k=rng.randint(1, 8)))
    body = json.dumps(VALID[path], ensure_ascii=False)
    field = rng.choice(("hello", " you", " yes", "bundled", "none", '"a"'))
    raw = "".join(rng.choices(UNICODE, k=3)).encode("utf-8", "surrogatepass")
    return rng.choice([
        lambda: post(path, body.replace(field, json.dumps(text)[1:-1]).encode()),
        lambda: post(path, body.encode().replace(b"hello", raw)), lambda: post(path, body.encode("utf-16")),
        lambda: post(path, b"\xef\xbb\xbf" + body.encode()), lambda: post(path, rng.randbytes(count(rng, 3000))),
        lambda: post(path, body.encode().replace(b"hello", rng.randbytes(5))),
        lambda: post(path, body.encode("utf-7"))])()


def control_tokens(rng: random.Random) -> Hostile:
    """Return a request whose texts have the names of control tokens, or pieces of templates."""
    text = "".join(rng.choices(CONTROL + ("hi", " "), k=rng.randint(1, 30)))
    role = rng.choice(("user", "system", "assistant", "tool", "developer"))
    message = {"role": role, "content": rng.choice((text, [{"type": "text", "text": text}])), "name": text}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": text, "arguments": json.dumps({text: text})}}]}
    tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": {"title": text}}}
    return rng.choice([lambda: post(CHAT, {**SHORT, "messages": [message] * rng.randint(1, 4)}),
                       lambda: post(CHAT, {**SHORT, "messages": [call], "tools": [tool]}),
                       lambda: post(COMPLETIONS, {**SHORT, "prompt": text, "allow_special_tokens": rng.random() < 0.5}),
                       lambda: post("/tokenize", {"messages": [message]}),
                       lambda: post(COMPLETIONS, {**SHORT, "prompt": "a", "stop": [text]}),
                       lambda: post("/classify", {"model": "bundled", "input": text, "labels": [text, "a"]})])()


def adapters(rng: random.Random) -> Hostile:
    """Return a request that loads an adapter from a place where there is none, or unloads it."""
    path = "".join(rng.choices(PATHS, k=rng.randint(1, 2)))
    name = rng.choice(("a", "bundled", "", "\0", "n" * 300, "../a", "<|im_end|>"))
    return post(rng.choice((LOAD, LOAD, LOAD, UNLOAD)), {"lora_name": name, "lora_path": path})


def counts(rng: random.Random) -> Hostile:
    """Return a request for more answers or inputs than fit, or for as many as just fit."""
    n = count(rng, 130)
    return rng.choice([
        lambda: post(COMPLETIONS, {**SHORT, "temperature": 1, "prompt": ["a"] * count(rng, 1000), "n": n}),
        lambda: post(COMPLETIONS, {**SHORT, "prompt": [[5, 6]] * count(rng, 3000), "n": rng.choice((1, 128))}),
        lambda: post(CHAT, {**VALID[CHAT], "temperature": 1, "n": n, "logprobs": True, "top_logprobs": 20}),
        lambda: post(EMBEDDINGS, {"model": "bundled", "input": ["a"] * rng.choice((1, 17, 60, 2049, 9999))}),
        lambda: post("/classify", {"model": "bundled", "input": ["a"] * rng.choice((1, 9, 257)),
                                   "labels": [f" l{i}" for i in range(rng.choice((2, 5, 65)))]}),
        lambda: post(COMPLETIONS, {**VALID[COMPLETIONS], "temperature": 1, "n": 16, "stream": True, "logprobs": 20})])()


def times(rng: random.Random) -> Hostile:
    """Return a request with a deadline that is hard to meet, or with a client that hardly waits."""
    body = {**VALID[COMPLETIONS], "max_tokens": 100, "ignore_eos": True, "stream": rng.random() < 0.5,
            "timeout": rng.choice((1e-9, 0.001, 0.01, 0.05, 86400, 86401, -1, 5e-324))}
    return post(COMPLETIONS, body)


def grammars(rng: random.Random) -> Hostile:
    """Return a request for a structured output or a tool call that is hard to compile or to follow."""
    def schema() -> dict:
        return rng.choice((reference_chain, intersection, random_schema))(rng)

    tool = {"type": "function", "function": {"name": "f", "parameters": schema()}}
    fields = rng.choice([
        lambda: {"guided_json": schema()}, lambda: {"guided_json": damaged(rng, json.dumps(schema()))},
        lambda: {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema()}}},
        lambda: {"guided_regex": pattern(rng)}, lambda: {"guided_grammar": rule_chain(rng)},
        lambda: {"guided_grammar": ambiguous(rng)},
        lambda: {"guided_choice": [f"c{i}" for i in range(count(rng, 60_000))]},
        lambda: {"tools": [tool] * rng.randint(1, 5), "tool_choice": "required"}, lambda: {"tools": [tool]}])()
    return post(CHAT, {**VALID[CHAT], **fields})


def sampling(rng: random.Random) -> Hostile:
    """Return a request with extreme options of sampling, most of them valid."""
    options = {"temperature": (1e-30, 1e-6, 1e30, 2.0), "top_p": (1e-30, 1e-7, 1.0), "min_p": (1.0, 1e-30),
               "top_k": (1, 2**31 - 1, -1), "repetition_penalty": (1e-30, 1e30), "presence_penalty": (2, -2),
               "frequency_penalty": (2, -2), "seed": (-2**63, 2**64 - 1), "logprobs": (0, 20),
               "logit_bias": ({str(i): -100 for i in range(300)}, {"5": 100, "6": 100.0}, {"00005": 1, "5": 2}),
               "stop_token_ids": (list(range(16)), [0]), "min_tokens": (2, 4), "ignore_eos": (True,),
               "stop": (["a"] * 16, [chr(97 + i) * 1024 for i in range(16)], "\ufffd"), "stream": (True,), "n": (16,),
               "priority": (-2**30, 2**30), "cache_salt": ("\0", "s" * 256)}
    chosen = {name: rng.choice(options[name]) for name in rng.sample(list(options), rng.randint(1, 6))}
    prompt = rng.choice(("hello", "a " * count(rng, 900), [5] * count(rng, 900)))
    return post(COMPLETIONS, {**SHORT, "max_tokens": 4, "temperature": 1, "prompt": prompt, **chosen})


def json_texts(rng: random.Random) -> Hostile:
    """Return a request whose body is damaged JSON."""
    path = rng.choice(list(VALID))
    text = json.dumps(VALID[path])
    other = rng.choice((text[:-1], text + text, text.replace(":", "=", 1), text.replace('"', "'"), text + ",",
                        "// a\n" + text, text.replace("{", '{"model": 3, ', 1), f"[{text}]", json.dumps(text), text[1:],
                        "null", "", "\0"))
    return post(path, rng.choice((other, damaged(rng, text))).encode())


def tools(rng: random.Random) -> Hostile:
    """Return a chat with odd tools, or with calls of earlier answers that cannot be."""
    name = rng.choice(("f", "", "a b", "x" * 65, "é", "</tool_call>", "__proto__"))
    function = {"name": name, "parameters": rng.choice((
        None, {}, {"type": 3}, {"$ref": "#"}, {"type": "object", "properties": 1}, {"$ref": "http://localhost/x"},
        {"enum": []}, {"x-guidance": 1}))}
    arguments = rng.choice(("{", "", "null", "[1]", '{"a": NaN}', "1e999", '"\\ud800"', "{" * 3000, '{"a": 1, "a": 2}'))
    call = {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}] * count(rng, 200)}
    choice = rng.choice(("required", "auto", "none", {"type": "function", "function": {"name": name}}, "any"))
    messages = rng.choice((HELLO, [call], [*HELLO, call, {"role": "tool", "content": "x"}]))
    tool = {"type": "function", "function": function}
    return post(CHAT, {**SHORT, "messages": messages, "tools": [tool] * rng.choice((1, 1, 100)), "tool_choice": choice})


KINDS = {make.__name__: Kind(make) for make in (
    sizes, depths, types, numbers, unicode, control_tokens, adapters, counts, times, grammars, sampling, json_texts,
    tools)} | CONNECTIONS
