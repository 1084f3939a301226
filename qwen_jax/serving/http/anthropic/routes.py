"""Routes of Anthropic's Messages protocol."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen_jax.serving.http.anthropic.protocol import CountRequest, MessagesRequest
from qwen_jax.serving.http.anthropic.reply import MessageReply
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.http.streaming import STREAMS, respond


def messages_routes(service: Service) -> APIRouter:
    """Return a router with the routes that answer in Anthropic's form and count tokens of prompts."""
    routes = APIRouter()

    @routes.post("/v1/messages", responses=STREAMS)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Generate the model's answer to a conversation, whole or as a stream, as Anthropic's clients read it."""
        service.check_open()
        chat = body.chat()
        params, conversation = chat.params(), chat.conversation()
        reply = MessageReply(chat.model or service.model, tools=bool(conversation["tools"]),
                             single_call=chat.parallel_tool_calls is False)
        service.note_prompt(request, conversation)
        return await respond(service, chat, request, reply, [service.start(request, chat, conversation, params)])

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountRequest) -> Any:
        """Return the number of tokens of a conversation, up to where the model begins to answer."""
        service.adapter(body.model)
        tokens = await service.link.call("tokenize", body.chat().conversation(), True)
        return {"input_tokens": len(tokens)}

    return routes
