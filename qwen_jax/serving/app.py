"""The routes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException

from qwen_jax.errors import UserError
from qwen_jax.serving.answers import VERSION, Reply
from qwen_jax.serving.errors import ApiError
from qwen_jax.serving.limits import Limits
from qwen_jax.serving.link import Answer, EngineLink, pieces
from qwen_jax.serving.protocol import (
    AdapterRequest,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampled,
    Scored,
    ScoreRequest,
    TokenizeRequest,
)

ERRORS = {status: {"description": "An error object."} for status in (400, 401, 404, 408, 413, 429, 431, 500, 503)}
DONE = b"data: [DONE]\n\n"


class Service:
    """What routes share.

    Attributes:
      draining: takes no new requests; adapters: names that may be asked for as models, beside ``model``.
    """

    def __init__(self, link: EngineLink, model: str, stall_seconds: float) -> None:
        self.link, self.model, self._stall_seconds = link, model, stall_seconds
        self.draining = False
        self.adapters: dict[str, str] = {}

    def check_open(self) -> None:
        if self.draining:
            raise ApiError(503, "the server is draining: it takes no new requests", retry_after=5)
        self.link.check_alive()

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a request's ``model`` names; None for the model itself."""
        if model is None or model == self.model:
            return None
        if model not in self.adapters:
            raise ApiError(404, f"the model {model!r} does not exist: use {', '.join([self.model, *self.adapters])}",
                           "model_not_found", "model")
        return model

    def check_health(self) -> None:
        if self.link.failure:
            raise ApiError(503, f"the engine has stopped: {self.link.failure}")
        if self.link.silent_seconds() > self._stall_seconds:
            raise ApiError(503, f"the engine has had work for {self.link.silent_seconds():.0f} s and made no step")

    def check_ready(self) -> None:
        self.check_health()
        self.check_open()

    def start(self, body: Sampled | Scored, prompt: Any, params: dict[str, Any], **more: Any) -> Answer:
        """ApiError when it cannot be."""
        return self.link.generate({"prompt": prompt, "params": params, "adapter": self.adapter(body.model),
                                   "priority": body.priority, "timeout": body.timeout, "stream": bool(body.stream),
                                   **more}, params.get("n", 1))


def create_app(service: Service, keys: Iterable[bytes] = (), body_bytes: int = 4 << 20) -> FastAPI:
    app = FastAPI(title="qwen-jax", version=VERSION, responses=ERRORS)
    app.add_middleware(Limits, keys=keys, body_bytes=body_bytes)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)

    @app.get("/health")
    async def health() -> Any:
        service.check_health()
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Any:
        service.check_ready()
        return {"status": "ready"}

    @app.get("/stats")
    async def stats() -> Any:
        """The engine's counters, and of its last step."""
        return {"requests": service.link.requests, "last_step": service.link.gauges,
                "engine": await service.link.call("stats")}

    @app.get("/v1/models")
    async def models() -> Any:
        names = [service.model, *service.adapters]
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "qwen-jax",
                                            "parent": service.model if name in service.adapters else None}
                                           for name in names]}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        service.check_open()
        params = body.params()
        conversation = body.conversation()
        reply = Reply(body.model, True, body.n or 1, bool(conversation["tools"]), bool(body.logprobs))
        return await _answered(service, body, request, reply, [service.start(body, conversation, params)])

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_open()
        prompts, params = body.prompts(), body.params()
        if body.logprobs is not None:
            params["logprobs"] = body.logprobs
        reply = Reply(body.model, False, len(prompts) * (body.n or 1), False, body.logprobs is not None)
        answers: list[Answer] = []
        try:
            for prompt in prompts:
                answers.append(service.start(body, prompt, params))
        except ApiError:
            for answer in answers:
                service.link.close(answer)
            raise
        return await _answered(service, body, request, reply, answers)

    @app.post("/score")
    async def score(body: ScoreRequest, request: Request) -> Any:
        """Log-probability of a continuation after a prompt."""
        service.check_open()
        (logprobs,), = await _scores(service, body, request, [body.prompt], [body.continuation])
        return {"object": "score", "model": body.model, "logprob": sum(logprobs), "token_logprobs": logprobs}

    @app.post("/classify")
    async def classify(body: ClassifyRequest, request: Request) -> Any:
        """Probability of each label as what follows each input; those of an input add up to 1."""
        service.check_open()
        data = []
        for index, found in enumerate(await _scores(service, body, request, body.inputs(), body.labels)):
            sums = [sum(logprobs) for logprobs in found]
            weights = [math.exp(one - max(sums)) for one in sums]
            probs = [weight / sum(weights) for weight in weights]
            data.append({"index": index, "label": body.labels[probs.index(max(probs))], "probs": probs})
        return {"object": "list", "model": body.model, "labels": body.labels, "data": data}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Any:
        body.check_fields()
        service.adapter(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages")
        prompt = body.prompt if body.messages is None else {
            "messages": [message.for_template() for message in body.messages]}
        tokens = await service.link.call("tokenize", prompt)
        return {"count": len(tokens), "max_model_len": service.link.facts["max_seq_len"], "tokens": tokens}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Any:
        body.check_fields()
        service.adapter(body.model)
        return {"prompt": await service.link.call("detokenize", body.tokens)}

    @app.post("/v1/load_lora_adapter")
    async def load_adapter(body: AdapterRequest) -> Any:
        body.check_fields()
        if body.lora_path is None:
            raise ApiError(400, "lora_path is missing", param="lora_path")
        if body.lora_name == service.model:
            raise ApiError(400, f"{body.lora_name!r} is the model's name", param="lora_name")
        await service.link.call("load_adapter", body.lora_name, body.lora_path)
        service.adapters[body.lora_name] = body.lora_path
        return {"status": f"{body.lora_name} is loaded"}

    @app.post("/v1/unload_lora_adapter")
    async def unload_adapter(body: AdapterRequest) -> Any:
        body.check_fields()
        if body.lora_name not in service.adapters:
            raise ApiError(404, f"no adapter named {body.lora_name!r} is loaded", "model_not_found", "lora_name")
        await service.link.call("unload_adapter", body.lora_name)
        service.adapters.pop(body.lora_name, None)
        return {"status": f"{body.lora_name} is unloaded"}

    return app


async def _answered(service: Service, body: Sampled, request: Request, reply: Reply,
                    answers: list[Answer]) -> Response:
    """The whole answer, or a stream of it, that begins once there is something: until then errors have their status."""
    watching = asyncio.ensure_future(_gone(request))
    try:
        if not body.stream:
            await _unless(watching, _collect(reply, answers))
            return _json(reply.whole(), reply.weight_version)
        chunks = _chunks(service, reply, answers, bool(body.stream_options and body.stream_options.include_usage))
        first = await _unless(watching, anext(chunks))
    except BaseException:
        for answer in answers:
            service.link.close(answer)
        raise
    finally:
        watching.cancel()
        if not body.stream:
            for answer in answers:
                service.link.close(answer)
    return StreamingResponse(_from(first, chunks), media_type="text/event-stream",
                             headers={"Cache-Control": "no-cache", "X-Weight-Version": str(reply.weight_version)})


async def _scores(service: Service, body: Scored, request: Request, prompts: Sequence[Any],
                  continuations: Sequence[Any]) -> list[list[list[float]]]:
    """For every prompt, of every continuation, the log-probabilities of its tokens."""
    body.check_fields()
    answers: list[Answer] = []
    watching = asyncio.ensure_future(_gone(request))
    try:
        for prompt in prompts:
            for continuation in continuations:
                answers.append(service.start(body, prompt, {}, continuation=continuation))
        found = await _unless(watching, asyncio.gather(*map(_score, answers)))
    finally:
        watching.cancel()
        for answer in answers:
            service.link.close(answer)
    count = len(continuations)
    return [found[at:at + count] for at in range(0, len(found), count)]


async def _score(answer: Answer) -> list[float]:
    return [value async for some in pieces(answer) for piece in some for value in piece.score or ()]


async def _collect(reply: Reply, answers: list[Answer]) -> None:
    per_prompt = len(reply.choices) // len(answers)
    for place, answer in enumerate(answers):
        async for some in pieces(answer):
            for piece in some:
                for _ in reply.add(piece, place * per_prompt):
                    pass


async def _chunks(service: Service, reply: Reply, answers: list[Answer], usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events; those of one step together."""
    per_prompt = len(reply.choices) // len(answers)
    try:
        begun = False
        async with aclosing(_merged(answers)) as merged:
            async for place, some in merged:
                objects = [] if begun or not reply.id.startswith("chat") else list(reply.roles())
                begun = True
                for piece in some:
                    objects += reply.add(piece, place * per_prompt)
                if objects:
                    yield b"".join(map(_event, objects))
        yield (_event(reply.last()) if usage else b"") + DONE
    except ApiError as error:
        if not begun:
            raise
        yield _event(error.body) + DONE
    finally:
        for answer in answers:
            service.link.close(answer)


async def _merged(answers: list[Answer]) -> AsyncIterator[tuple[int, list]]:
    """Pieces of several requests as they come, each with its request's place."""
    if len(answers) == 1:
        async with aclosing(pieces(answers[0])) as only:
            async for some in only:
                yield 0, some
        return
    sources = [pieces(answer) for answer in answers]
    waiting = {asyncio.ensure_future(anext(source)): place for place, source in enumerate(sources)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place = waiting.pop(task)
                try:
                    yield place, task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(sources[place]))] = place
    finally:
        for task in waiting:
            task.cancel()


async def _from(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        yield first
        async for chunk in rest:
            yield chunk


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless(watching: asyncio.Future, awaitable: Any) -> Any:
    """The result, unless the client leaves first."""
    working = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(408, "the client has closed the connection")
    finally:
        working.cancel()


def _event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _json(value: Any, weight_version: int) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json",
                    headers={"X-Weight-Version": str(weight_version)})


async def _api_error(_request: Request, error: ApiError) -> Response:
    return Response(msgspec.json.encode(error.body), error.status, error.headers, "application/json")


async def _user_error(request: Request, error: UserError) -> Response:
    return await _api_error(request, ApiError(400, str(error)))


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    where = f"{'.'.join(place)}: " if place else ""
    return await _api_error(request, ApiError(400, where + first["msg"], param=place[0] if place else None))


async def _http_error(request: Request, error: HTTPException) -> Response:
    if error.status_code in (404, 405):
        return await _api_error(request, ApiError(404, f"there is no {request.method} {request.url.path}"))
    return await _api_error(request, ApiError(400, str(error.detail)))
