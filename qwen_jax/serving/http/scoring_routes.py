"""Routes that run prompts through the model and generate no text: scores, classifications, embeddings."""

from __future__ import annotations

import asyncio
import base64
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from qwen_jax.serving.http.protocol import ClassifyRequest, EmbeddingRequest, PrefillRequest, ScoreRequest
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.http.streaming import gone, note, unless
from qwen_jax.serving.ipc.engine_client import Answer, pieces
from qwen_jax.serving.ipc.errors import ApiError
from qwen_jax.serving.ipc.messages import Piece

MAX_KNOWN_LABELS = 1000
MAX_AT_ONCE = 256  # prompts of a request that the engine has at once, so that other requests find room
TOP_TOKENS = {"max_tokens": 1, "temperature": 0.0, "logprobs": 20}  # options that show the likely first tokens

Prefills = Sequence[tuple[Any, dict[str, Any]]]  # prompts, each with further options of `Service.start`
RunPrefills = Callable[[Prefills], Awaitable[list[Piece]]]


def scoring_routes(service: Service) -> APIRouter:
    """Return a router with the routes for scores, classifications and embeddings."""
    routes = APIRouter()
    lengths = _LabelLengths(service)

    @routes.post("/score")
    async def score(body: ScoreRequest, request: Request, response: Response) -> Any:
        """Return the log-probability of a continuation after a prompt, as a sum and for each of its tokens."""
        prefills = [(body.prompt, {"continuation": body.continuation})]
        piece, = await _run_prefills(service, body, request, response, prefills)
        return {"object": "score", "model": body.model or service.model, "logprob": sum(piece.score),
                "token_logprobs": piece.score, "usage": _usage([piece])}

    @routes.post("/classify")
    async def classify(body: ClassifyRequest, request: Request, response: Response) -> Any:
        """Return the probability of each label as the continuation of each input, normalised over the labels.

        Labels of one token mostly take one pass over an input for all of them, others one pass for each.
        """
        def run(prefills: Prefills) -> Awaitable[list[Piece]]:
            return _run_prefills(service, body, request, response, prefills)

        service.check_open()
        single = await lengths.are_single_tokens(body.labels, body.allow_special_tokens)
        logprobs, ended = await _label_logprobs(run, body.inputs(), body.labels, single)
        data = [_classification(index, body.labels, values) for index, values in enumerate(logprobs)]
        return {"object": "list", "model": body.model or service.model, "labels": body.labels, "data": data,
                "usage": _usage(ended)}

    @routes.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request, response: Response) -> Any:
        """Return an embedding of each input: mean or last of its final hidden states, by default scaled to length 1."""
        body.check_dimensions(service.link.facts)
        prefills = [(prompt, {"pooling": body.pooling, "normalize": body.normalize}) for prompt in body.inputs()]
        ended = await _run_prefills(service, body, request, response, prefills)
        data = [{"object": "embedding", "index": index, "embedding": _encode(piece.vector, body.encoding_format)}
                for index, piece in enumerate(ended)]
        return {"object": "list", "model": body.model or service.model, "data": data, "usage": _usage(ended)}

    return routes


class _LabelLengths:
    """Cache of whether a classification label is a single token, so that each label is tokenised once."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._single: dict[tuple[str, bool], bool] = {}

    async def are_single_tokens(self, labels: Sequence[str], allow_special_tokens: bool) -> bool:
        found = [await self._is_single(label, allow_special_tokens) for label in labels]
        return all(found)

    async def _is_single(self, *label: Any) -> bool:
        if label not in self._single:
            single = len(await self._service.link.call("tokenize", *label)) == 1
            if len(self._single) >= MAX_KNOWN_LABELS:
                self._single.clear()
            self._single[label] = single
        return self._single[label]


async def _label_logprobs(run: RunPrefills, inputs: Sequence[str], labels: Sequence[str], single: bool,
                          ) -> tuple[list[list[float]], list[Piece]]:
    """Return the log-probability of every label after each input, and the results of all the passes that were run.

    Args:
      run: runs prompts through the model.
      single: whether every label is one token. Then one pass is enough for an input after which all labels are among
        the most likely tokens; after any other input the labels are scored one by one.
    """
    logprobs: dict[int, list[float]] = {}  # log-probabilities of the labels, by input
    ended: list[Piece] = []
    if single:
        ended = await run([(prompt, {"params": TOP_TOKENS}) for prompt in inputs])
        for index, piece in enumerate(ended):
            likely = {token.utf8: token.logprob for token in piece.logprobs[0]}
            if all(label.encode() in likely for label in labels):
                logprobs[index] = [likely[label.encode()] for label in labels]
    rest = [index for index in range(len(inputs)) if index not in logprobs]
    if rest:
        scored = await run([(inputs[index], {"continuation": label}) for index in rest for label in labels])
        for at, index in enumerate(rest):
            logprobs[index] = [sum(piece.score) for piece in scored[at * len(labels):(at + 1) * len(labels)]]
        ended += scored
    return [logprobs[index] for index in range(len(inputs))], ended


def _classification(index: int, labels: Sequence[str], logprobs: Sequence[float]) -> dict[str, Any]:
    """Return the response's entry for an input: its likeliest label, and all labels' probabilities (a softmax)."""
    weights = [math.exp(logprob - max(logprobs)) for logprob in logprobs]
    probs = [weight / sum(weights) for weight in weights]
    return {"index": index, "label": labels[probs.index(max(probs))], "probs": probs}


async def _run_prefills(service: Service, body: PrefillRequest, request: Request, response: Response,
                        prefills: Prefills) -> list[Piece]:
    """Run all prompts through the model and return the result of each. ApiError 408 when the client leaves."""
    service.check_open()
    body.check_fields()
    starts = [partial(service.start, request, body, prompt, **{"params": {}, **options})
              for prompt, options in prefills]
    watching = asyncio.ensure_future(gone(request.receive))
    try:
        ended = await unless(watching, _last_pieces(service, starts))
    finally:
        watching.cancel()
    versions = {piece.weight_version for piece in ended}  # several when the weights were updated in between
    response.headers["X-Weight-Version"] = ",".join(map(str, sorted(versions)))
    note(request, model=body.model or service.model, **_usage(ended))
    return ended


async def _last_pieces(service: Service, starts: Sequence[Callable[[], Answer]]) -> list[Piece]:
    """Start requests and return the last piece of each answer, in order.

    At most `MAX_AT_ONCE` are open at once, and fewer where the server has no room for more: then the next one starts
    when another has ended. ApiError 429 if there is no room for the first.
    """
    waiting, open_answers, ended = deque(starts), deque(), []
    try:
        while waiting or open_answers:
            while waiting and len(open_answers) < MAX_AT_ONCE:
                try:
                    open_answers.append(waiting[0]())
                except ApiError as error:
                    if error.status != 429 or not open_answers:
                        raise
                    break
                waiting.popleft()
            ended.append([piece async for arrived in pieces(open_answers[0]) for piece in arrived][-1])
            service.link.close(open_answers.popleft())
        return ended
    finally:
        for answer in open_answers:
            service.link.close(answer)


def _usage(ended: Sequence[Piece]) -> dict[str, int]:
    tokens = sum(piece.prompt_tokens for piece in ended)
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _encode(vector: bytes, encoding: str) -> str | list[float]:
    """Return an embedding, given as float32 little-endian bytes, in base64 or as a list of floats."""
    return base64.b64encode(vector).decode() if encoding == "base64" else np.frombuffer(vector, "<f4").tolist()
