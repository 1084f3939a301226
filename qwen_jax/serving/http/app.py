"""The public routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from prometheus_client.registry import Collector

from qwen_jax.serving.http.app_factory import Inner, new_app
from qwen_jax.serving.http.http_metrics import HttpMetrics
from qwen_jax.serving.http.monitoring_routes import monitoring_routes
from qwen_jax.serving.http.openai_objects import Reply
from qwen_jax.serving.http.protocol import (
    AdapterRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from qwen_jax.serving.http.request_log import Observer
from qwen_jax.serving.http.scoring_routes import scoring_routes
from qwen_jax.serving.http.service import Service, contents_of
from qwen_jax.serving.http.streaming import answered
from qwen_jax.serving.ipc.engine_client import Answer
from qwen_jax.serving.ipc.errors import ApiError


def create_app(service: Service, observers: Sequence[Observer] = (), keys: Sequence[bytes] = (),
               body_bytes: int = 4 << 20, inner: Inner | None = None,
               collectors: Sequence[Collector] = (), routers: Sequence[APIRouter] = ()) -> FastAPI:
    """inner: middleware around the routes, within the checks; collectors: of metrics that are somebody else's; routers:
    more routes."""
    metrics = HttpMetrics(collectors)
    app = new_app("qwen-jax", (metrics.answered, *observers), keys, body_bytes, inner)
    app.include_router(monitoring_routes(service, metrics))
    app.include_router(scoring_routes(service))
    for router in routers:
        app.include_router(router)

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
        service.note_prompt(request, conversation)
        return await answered(service, body, request, reply, [service.start(body, conversation, params)])

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_open()
        prompts, params = body.prompts(), body.params()
        if body.logprobs is not None:
            params["logprobs"] = body.logprobs
        service.note_prompt(request, prompts)
        reply = Reply(body.model, False, len(prompts) * (body.n or 1), False, body.logprobs is not None)
        answers: list[Answer] = []
        try:
            for prompt in prompts:
                answers.append(service.start(body, prompt, params))
        except ApiError:
            for answer in answers:
                service.link.close(answer)
            raise
        return await answered(service, body, request, reply, answers)

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
        contents = contents_of(body.lora_path)
        await service.link.call("load_adapter", body.lora_name, body.lora_path)
        service.adapters[body.lora_name] = contents
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
