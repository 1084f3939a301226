"""Routes of OpenAI's Responses protocol."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen_jax.serving.http.responses.protocol import ResponsesRequest
from qwen_jax.serving.http.responses.reply import ResponseReply
from qwen_jax.serving.http.responses.store import ResponseStore
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.http.streaming import STREAMS, respond
from qwen_jax.serving.ipc.errors import ApiError


def responses_routes(service: Service) -> APIRouter:
    """Return a router with the routes that make, read, cancel and delete responses."""
    routes, store = APIRouter(), ResponseStore()

    @routes.post("/v1/responses", responses=STREAMS)
    async def create(body: ResponsesRequest, request: Request) -> Response:
        """Generate the model's answer to a conversation, whole or as a stream; keep it unless ``store`` is false."""
        service.check_open()
        caller: bytes = request.scope["caller"].key
        before = msgspec.json.decode(store.get(body.previous_response_id, caller).conversation) if (
            body.previous_response_id) else []
        chat = body.chat(before)
        params, conversation = chat.params(), chat.conversation()
        reply = ResponseReply(chat.model or service.model, body, tools=bool(conversation["tools"]))
        service.note_prompt(request, conversation)

        def keep() -> None:
            if body.store:
                store.keep(reply.whole(), [*before, *body.messages(), *reply.messages()], caller)

        answer = service.start(request, chat, conversation, params, to_end_of_context="max_tokens" not in params)
        return await respond(service, chat, request, reply, [answer], on_end=keep)

    @routes.get("/v1/responses/{response_id}")
    async def retrieve(response_id: str, request: Request) -> Response:
        """Return a response that was kept."""
        kept = store.get(response_id, request.scope["caller"].key)
        return Response(kept.response, media_type="application/json")

    @routes.delete("/v1/responses/{response_id}")
    async def delete(response_id: str, request: Request) -> Any:
        """Forget a response that was kept."""
        store.delete(response_id, request.scope["caller"].key)
        return {"id": response_id, "object": "response", "deleted": True}

    @routes.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str, request: Request) -> Any:
        """Refuse to cancel: only responses in the background can be, which this server does not have."""
        store.get(response_id, request.scope["caller"].key)
        raise ApiError(400, "only responses in the background can be cancelled, and this one has ended",
                       param="response_id")

    return routes
