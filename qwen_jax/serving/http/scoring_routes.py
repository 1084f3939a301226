"""Routes that need a prefill and no answer: scores, classifications, embeddings."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from qwen_jax.serving.http.protocol import ClassifyRequest, EmbeddingRequest, Scored, ScoreRequest
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.http.streaming import gone, note, unless
from qwen_jax.serving.ipc.engine_client import Answer, pieces
from qwen_jax.serving.ipc.messages import Piece

KNOWN_LABELS = 1000
FIRST_TOKEN = {"max_tokens": 1, "temperature": 0.0, "logprobs": 20}


def scoring_routes(service: Service) -> APIRouter:
    routes = APIRouter()
    single: dict[str, bool] = {}  # of labels that were asked for: whether it is one token

    async def single_tokens(labels: Sequence[str]) -> bool:
        for label in labels:
            if label not in single:
                if len(single) >= KNOWN_LABELS:
                    single.clear()
                single[label] = len(await service.link.call("tokenize", label)) == 1
        return all(single[label] for label in labels)

    @routes.post("/score")
    async def score(body: ScoreRequest, request: Request, response: Response) -> Any:
        """Log-probability of a continuation after a prompt."""
        asked = [(body.prompt, {"continuation": body.continuation})]
        piece, = await _ended(service, body, request, response, asked)
        return {"object": "score", "model": body.model, "logprob": sum(piece.score), "token_logprobs": piece.score,
                "usage": _usage([piece])}

    @routes.post("/classify")
    async def classify(body: ClassifyRequest, request: Request, response: Response) -> Any:
        """Probability of each label as what follows each input; those of an input add up to 1.

        Labels of one token each take one pass over an input for all of them, others one for each.
        """
        inputs, labels = body.inputs(), body.labels
        service.check_open()
        found: dict[int, list[float]] = {}  # log-probabilities of the labels, by input
        ended: list[Piece] = []
        if await single_tokens(labels):
            asked = [(prompt, {"params": FIRST_TOKEN}) for prompt in inputs]
            ended = await _ended(service, body, request, response, asked)
            for index, piece in enumerate(ended):
                likely = dict(piece.logprobs[0][2])
                if all(label in likely for label in labels):
                    found[index] = [likely[label] for label in labels]
        rest = [index for index in range(len(inputs)) if index not in found]
        if rest:
            asked = [(inputs[index], {"continuation": label}) for index in rest for label in labels]
            scored = await _ended(service, body, request, response, asked)
            for at, index in enumerate(rest):
                found[index] = [sum(piece.score) for piece in scored[at * len(labels):(at + 1) * len(labels)]]
            ended += scored
        data = []
        for index in range(len(inputs)):
            weights = [math.exp(one - max(found[index])) for one in found[index]]
            probs = [weight / sum(weights) for weight in weights]
            data.append({"index": index, "label": labels[probs.index(max(probs))], "probs": probs})
        return {"object": "list", "model": body.model, "labels": labels, "data": data, "usage": _usage(ended)}

    @routes.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request, response: Response) -> Any:
        """The mean of the final hidden states of each input, or the last one of them, of length 1."""
        body.check_dimensions(service.link.facts)
        asked = [(prompt, {"pooling": body.pooling, "normalize": body.normalize}) for prompt in body.inputs()]
        ended = await _ended(service, body, request, response, asked)
        data = [{"object": "embedding", "index": index, "embedding": _shown(piece.vector, body.encoding_format)}
                for index, piece in enumerate(ended)]
        return {"object": "list", "model": body.model, "data": data, "usage": _usage(ended)}

    return routes


async def _ended(service: Service, body: Scored, request: Request, response: Response,
                 asked: Sequence[tuple[Any, dict[str, Any]]]) -> list[Piece]:
    """The last piece of each prefill. ``asked``: prompts, each with what is wanted of it."""
    service.check_open()
    body.check_fields()
    answers: list[Answer] = []
    watching = asyncio.ensure_future(gone(request.receive))
    try:
        for prompt, wanted in asked:
            answers.append(service.start(body, prompt, **{"params": {}, **wanted}))
        ended = await unless(watching, _all_ended(answers))
    finally:
        watching.cancel()
        for answer in answers:
            service.link.close(answer)
    versions = {piece.weight_version for piece in ended}
    response.headers["X-Weight-Version"] = ",".join(map(str, sorted(versions)))  # an update may have come in between
    note(request, model=body.model, **_usage(ended))
    return ended


async def _all_ended(answers: Sequence[Answer]) -> list[Piece]:
    return [[piece async for some in pieces(answer) for piece in some][-1] for answer in answers]


def _usage(ended: Sequence[Piece]) -> dict[str, int]:
    tokens = sum(piece.prompt_tokens for piece in ended)
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _shown(vector: bytes, encoding: str) -> str | list[float]:
    return base64.b64encode(vector).decode() if encoding == "base64" else np.frombuffer(vector, "<f4").tolist()
