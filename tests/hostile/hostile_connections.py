"""Hostile addresses, headers and connections, made from random numbers."""

from __future__ import annotations

import json
import random

from grammar_fuzz import count, damaged
from hostile_client import CHAT, COMPLETIONS, EMBEDDINGS, VALID, Hostile, Kind, http, post

METHODS = ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "BREW", "get", "PROPFIND", "PRI")
ROUTES = (*VALID, "/health", "/metrics", "/stats", "/", "/openapi.json", "/v1/models", "/ready", "/admin/weights",
          "/docs")


def addresses(rng: random.Random) -> Hostile:
    """Return a request with an odd method or address."""
    piece = rng.choice((b"//", b"/../", b"/%00", b"/%ff", b"/%2e%2e/%2e%2e/etc", b"?" + b"a=b&" * count(rng, 6000),
                        b"#x", b"/v1", b";a", b"/" + b"a" * count(rng, 30_000), b"\xff\xfe", b"%", b" ", b"/\\",
                        b"?%zz"))
    path = rng.choice((rng.choice(ROUTES).encode() + piece, piece + rng.choice(ROUTES).encode(), b"*", b"http://x/y"))
    return Hostile((http(rng.choice(METHODS), path if rng.random() < 0.7 else rng.choice(ROUTES)),), silent=True)


def headers(rng: random.Random) -> Hostile:
    """Return a request with odd headers."""
    name, value = rng.choice([
        (b"authorization", rng.choice((b"Bearer ", b"Bearer \xff", b"Basic eDp5", b"Bearer " + b"k" * 9000, b""))),
        (b"x-request-id", rng.choice((b"\xff", b"a" * 500, b"../..", b"a b", b"%0d%0a"))),
        (b"content-type", b"text/plain"), (b"content-type", b"application/json; charset=utf-16"),
        (b"content-encoding", b"gzip"), (b"expect", b"100-continue"),
        (b"traceparent", rng.randbytes(20).hex().encode()),
        (b"content-length", rng.choice((b"0", b"-1", b"99", b"x", b"1e3"))),
        (b"transfer-encoding", rng.choice((b"chunked", b"gzip", b"chunked, chunked", b"identity", b"\x0bchunked"))),
        (b"upgrade", rng.choice((b"websocket", b"h2c"))), (b"connection", b"upgrade, keep-alive"),
        (b"host", b"\xff" * 99), (b"x" * count(rng, 20_000), b"y"), (b"x", b"y" * count(rng, 40_000)),
        (b"cookie", rng.randbytes(99).hex().encode()),
        (b"bad name", b"x"), (b"", b"x"), (b"x", b"\0"), (b"range", b"bytes=0-9,5-"), (b"forwarded", b"for=\"[::1]\"")])
    path = rng.choice((COMPLETIONS, COMPLETIONS, "/health", "/metrics"))
    body = json.dumps(VALID[COMPLETIONS]).encode() if path == COMPLETIONS else b""
    request = http("POST" if body else "GET", path, body, [(name, value)] * rng.choice((1, 1, 2, 500)))
    return Hostile((request,), leaves=2, silent=True)


def wire(rng: random.Random) -> Hostile:
    """Return bytes that are no HTTP, or HTTP with damage."""
    request = http("POST", COMPLETIONS, json.dumps(VALID[COMPLETIONS]).encode())
    chunked = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    content = rng.choice([
        lambda: rng.randbytes(count(rng, 50_000)),
        lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500),
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(50), lambda: request[: rng.randrange(len(request))],
        lambda: request.replace(b"HTTP/1.1", rng.choice((b"HTTP/9.9", b"HTTP/0.9", b"HTTP/1.0", b"", b"HTTP/1.1 x"))),
        lambda: chunked + rng.choice((b"-1\r\n", b"ffffffffffffffff\r\n", b"zz\r\n", b"5;" + b"x" * 9000,
                                      b"0\r\n\r\n", b"3\r\n{}")),
        lambda: damaged(rng, request.decode()).encode(), lambda: request * 3, lambda: b"\r\n" * 5000 + request,
        lambda: b"\x05\x01\x00", lambda: b"GET /health HTTP/1.1\r\n" + b"x-a: b\r\n" * count(rng, 9000),
        lambda: request + rng.randbytes(5000)])()
    return Hostile((content,), leaves=rng.uniform(0.2, 0.6), silent=True)


def flood(rng: random.Random) -> Hostile:
    """Return one of many requests that arrive together: metrics, pages, answers."""
    path = rng.choice(("/metrics", "/metrics", "/stats", "/", "/health", "/openapi.json"))
    body = {**VALID[COMPLETIONS], "max_tokens": 10, "ignore_eos": True}
    return post(COMPLETIONS, body) if rng.random() < 0.3 else Hostile((http("GET", path),))


def pipelined(rng: random.Random) -> Hostile:
    """Return a connection with many requests one after another, whose answers are not waited for."""
    request = rng.choice((b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n",
                          b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"))
    return Hostile((request * count(rng, 20_000),), leaves=1, reads=rng.random() < 0.5, silent=True)


def slow(rng: random.Random) -> Hostile:
    """Return a client that sends its request in small pieces, or none, or does not read the answer."""
    body = {**VALID[COMPLETIONS], "max_tokens": 60, "ignore_eos": True, "stream": True}
    request, = post(COMPLETIONS, body).parts
    size = rng.choice((1, 7, 40))
    pieces = tuple(part for at in range(0, len(request), size) for part in (request[at : at + size], 0.005))
    return rng.choice([lambda: Hostile(pieces, leaves=1), lambda: Hostile((request,), leaves=1, reads=False),
                       lambda: Hostile((), leaves=1), lambda: Hostile((b"GET", 0.5, b" /health"), leaves=1)])()


def leaving(rng: random.Random) -> Hostile:
    """Return a client that leaves at any time: while it sends, waits or reads."""
    path = rng.choice((COMPLETIONS, CHAT))
    body = {**VALID[path], "temperature": 1, "max_tokens": 100, "ignore_eos": True, "stream": rng.random() < 0.6,
            "n": rng.choice((1, 1, 4))}
    request, = post(rng.choice((path, path, EMBEDDINGS)), body).parts
    sent = rng.choice((len(request), rng.randrange(len(request))))
    return Hostile((request[:sent],), leaves=rng.expovariate(5) + 0.01)


CONNECTIONS = {make.__name__: Kind(make) for make in (addresses, headers, leaving)} | {
    make.__name__: Kind(make, at_once=16) for make in (wire, slow, pipelined)} | {
    "flood": Kind(flood, at_once=50, short=100)}
