"""Routes that generate text: chats and completions, with OpenAI's protocol."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen_jax.serving.http.openai_objects import Reply
from qwen_jax.serving.http.protocol import ChatRequest, CompletionRequest
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.http.streaming import STREAMS, respond
from qwen_jax.serving.ipc.engine_client import Answer
from qwen_jax.serving.ipc.errors import ApiError


def generation_routes(service: Service) -> APIRouter:
    """Return a router with the routes that generate text: chat completions and completions."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", responses=STREAMS)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Generate the model's answers to a conversation, whole or as a stream."""
        service.check_open()
        params = body.params()
        conversation = body.conversation()
        reply = Reply(body.model or service.model, chat=True, count=body.n or 1, tools=bool(conversation["tools"]),
                      logprobs=bool(body.logprobs), single_call=body.parallel_tool_calls is False)
        service.note_prompt(request, conversation)
        answer = service.start(request, body, conversation, params, to_end_of_context="max_tokens" not in params)
        return await respond(service, body, request, reply, [answer])

    @routes.post("/v1/completions", responses=STREAMS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Generate continuations of one or several prompts, whole or as a stream."""
        service.check_open()
        prompts, params = body.prompts(), body.params()
        more = {"echo": bool(body.echo), "suffix": body.suffix}
        service.note_prompt(request, prompts)
        count = len(prompts) * (body.n or 1)
        service.link.open_answers.check(count)
        reply = Reply(body.model or service.model, chat=False, count=count, tools=False,
                      logprobs=body.logprobs is not None, only_prompt=body.only_prompt)
        answers: list[Answer] = []
        try:
            for prompt in prompts:
                answers.append(service.start(request, body, prompt, params, **more))
        except ApiError:
            for answer in answers:
                service.link.close(answer)
            raise
        return await respond(service, body, request, reply, answers)

    return routes
