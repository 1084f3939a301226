"""What is in the key of a cached response: whatever of it changes, alone, the answer is computed anew."""
import asyncio
import json
from types import SimpleNamespace

import msgspec
import pytest

from qwen_jax.cluster.response_cache.cache import ResponseCache
from qwen_jax.cluster.response_cache.middleware import CachedRoute, CacheMiddleware
from qwen_jax.cluster.routing.load_balancer import LoadBalancer
from qwen_jax.serving.http.limits import Caller
from qwen_jax.serving.ipc.engine_client import EngineClient
from qwen_jax.serving.ipc.messages import Computes, Ready
from qwen_jax.serving.options import WITHOUT_INFLUENCE, ServerOptions

BODY = {"model": "base", "prompt": "hello", "temperature": 0, "max_tokens": 8}
ROUTES = {"/a": CachedRoute("completion"), "/b": CachedRoute("chat")}


class World:
    """A server whose engine's answer is the number of answers so far, and everything that a key is made of."""

    def __init__(self):
        self.computes, self.body, self.path, self.key = Computes("weights", {"one": "1", "two": "2"}), BODY, "/a", b"k"
        self.promoted, self.http = "", ["sources", {"flag": False}]
        self.cache, self.answers = ResponseCache(), 0

    async def engine(self, scope, receive, send):
        self.answers += 1
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-weight-version", b"0")]})
        await send({"type": "http.response.body", "body": str(self.answers).encode()})

    async def ask(self) -> str:
        link = EngineClient("base", {}, 8)
        link._take(self.computes)
        service = SimpleNamespace(model="base", adapters={"one", "two"}, draining=False, weight_version=0, link=link,
                                  varies=lambda: self.promoted)
        app = CacheMiddleware(self.engine, service, self.cache, http=self.http, routes=ROUTES,
                              adapter_for=lambda user: "")
        sent, body = [], [{"type": "http.request", "body": json.dumps(self.body).encode()}]

        async def receive():
            return body.pop() if body else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        await app({"type": "http", "method": "POST", "path": self.path, "details": {},
                   "headers": [], "caller": Caller(self.key, False)}, receive, send)
        return dict(sent[0]["headers"]).get(b"x-cache", b"").decode()


CHANGES = {
    "weights": {"computes": Computes("others", {"one": "1"})},
    "sources of the server": {"http": ["others", {"flag": False}]},
    "options of the server": {"http": ["sources", {"flag": True}]},
    "kind": {"path": "/b"}, "API key": {"key": b"another"},
    **{f"body: {field}": {"body": {**BODY, field: value}} for field, value in {
        "prompt": "hello ", "max_tokens": 9, "min_tokens": 1, "temperature": 0.0, "top_k": 1, "top_p": 0.5,
        "repetition_penalty": 1.1, "logit_bias": {"1": 1}, "stop": "x", "stop_token_ids": [1], "ignore_eos": True,
        "logprobs": 1, "n": 2, "guided_json": {}, "cache_salt": "s", "a field of tomorrow": 1, "model": "one"}.items()},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_anything_is_a_miss(change):
    world = World()
    assert [asyncio.run(world.ask()) for _ in range(2)] == ["miss", "hit"]
    vars(world).update(change)
    assert [asyncio.run(world.ask()) for _ in range(2)] == ["miss", "hit"] and world.answers == 2


@pytest.mark.parametrize("named", [True, False])
def test_another_adapter_under_the_same_name_is_a_miss(named):
    """An adapter that a request names, or that answers all requests for the base model."""
    world = World()
    world.body, world.promoted = ({**BODY, "model": "one"}, "") if named else (BODY, "one")
    assert [asyncio.run(world.ask()) for _ in range(2)] == ["miss", "hit"]
    world.computes = Computes("weights", {"one": "others", "two": "2"})
    assert [asyncio.run(world.ask()) for _ in range(2)] == ["miss", "hit"]


def test_nothing_is_kept_while_the_contents_are_not_known():
    world = World()
    for computes, promoted in ((Computes(None, {}), ""), (Computes("weights", {}), "one")):
        world.computes, world.promoted = computes, promoted
        assert [asyncio.run(world.ask()) for _ in range(2)] == ["", ""]


def test_an_answer_is_not_kept_when_what_computes_it_changes_meanwhile(monkeypatch):
    world, before = World(), EngineClient.computes
    asked = iter(["old", "old", "new", "new"])  # for the key, before the answer, and after it
    monkeypatch.setattr(EngineClient, "computes", lambda *_: next(asked))
    assert asyncio.run(world.ask()) == "miss"
    monkeypatch.setattr(EngineClient, "computes", before)
    world.computes = Computes("old", {})
    assert asyncio.run(world.ask()) == "miss"


def test_several_engines_answer_from_the_cache_while_they_compute_the_same():
    links = iter([EngineClient("base", {}, 8) for _ in range(2)])
    balancer = LoadBalancer([lambda: next(links)] * 2, 8)
    first, second = (replica.link for replica in balancer.replicas)
    assert balancer.computes(None) is None
    for link in (first, second):
        link._take(Ready(100, 64, 0.0))
        link._take(Computes("weights", {"one": "1"}))
    assert balancer.computes(None) == "weights" and balancer.computes("one") == first.computes("one")
    second._take(Computes("weights", {"one": "others"}))  # the folder has changed before this engine read it
    assert balancer.computes(None) == "weights" and balancer.computes("one") is None
    second._take(Computes("others", {"one": "1"}))
    assert balancer.computes(None) is None


def test_every_option_of_a_server_counts_but_those_that_only_say_where_and_when_it_answers():
    names = {field.name for field in msgspec.structs.fields(ServerOptions)}
    assert set(ServerOptions().deciding()) == names - WITHOUT_INFLUENCE and WITHOUT_INFLUENCE <= names
