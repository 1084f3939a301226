"""Routes that turn text into token ids and back."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from qwen_jax.serving.http.protocol import DetokenizeRequest, TokenizeRequest
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.ipc.errors import ApiError


def tokenizer_routes(service: Service) -> APIRouter:
    """Return a router with the routes that turn text into token ids and back."""
    routes = APIRouter()

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Any:
        """Return the token ids of a prompt or of a conversation, and their number."""
        body.check_fields()
        service.adapter(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages")
        prompt = body.prompt if body.messages is None else {
            "messages": [message.for_template() for message in body.messages]}
        tokens = await service.link.call("tokenize", prompt, body.allow_special_tokens)
        return {"count": len(tokens), "max_model_len": service.link.facts.max_seq_len, "tokens": tokens}

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Any:
        """Return the text that token ids stand for."""
        body.check_fields()
        service.adapter(body.model)
        return {"prompt": await service.link.call("detokenize", body.tokens)}

    return routes
