"""Routes that screen card payments: from a payment and its account, as JSON, to a verdict.

The payment is put into the words that the model was trained on. The verdict is one prefill: the probabilities of
``fraud`` and ``legit`` as the first word of the answer. Only a fraud takes a second request, for the token that makes
its reason code; the evidence is read off the fields that the code names, so it cannot be invented.
"""

from __future__ import annotations

import asyncio
import math
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field, StrictInt, StrictStr

from qwen_jax.cluster.canary.client import CanaryClient
from qwen_jax.evaluation.fraud.accounts import CATEGORIES, DAYS, PATTERNS
from qwen_jax.evaluation.fraud.request import evidence_of, prompt_of
from qwen_jax.serving.http.protocol import EngineRequest, Items, Part
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.http.streaming import gone, note, unless
from qwen_jax.serving.ipc.engine_client import Answer, pieces
from qwen_jax.serving.ipc.messages import Piece

SCREEN_PATH, BATCH_PATH = "/fraud/screen", "/fraud/screen/batch"
FRAUD, LEGIT = "fraud", "legit"
MAX_BATCH = 64
ONE_TOKEN = {"max_tokens": 1, "temperature": 0.0, "logprobs": 4}
CODE_PREFIX = f"{FRAUD} R0"  # beginning of an answer; one digit completes the reason code

Name = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9._-]{1,32}$", examples=["Kalmart"])]
Word = Annotated[StrictStr, Field(pattern=r"^[a-z]{1,16}$", examples=["approved"])]
Amount = Annotated[StrictInt, Field(ge=0, le=10_000_000, examples=[436])]
Day = Literal[*DAYS]


class ItemStatus(Part):
    """A card, device or other item of an account, and its status.

    Attributes:
      name: name of the item.
      standing: its status in the word of the upstream system, such as active or lost.
    """

    name: Name
    standing: Word


Pair = Annotated[Items[ItemStatus], Field(min_length=2, max_length=2)]


class PastPayment(Part):
    """An earlier payment in an account's history."""

    day: Day
    city: Name
    amount: Amount
    status: Annotated[Word, Field(description="approved or declined")]
    merchant: Name
    claim: Annotated[Word, Field(description="settled or disputed")]


class AccountProfile(Part):
    """Profile and history of an account before the payment to screen.

    Attributes:
      number: number of the account.
      limit: limit of a payment, in whole units of the currency, like all amounts (the bundled model knows 100 to 999).
      home: the city of the account's owner.
      card: two cards, one in force and one not, in any order.
      device: two devices, likewise.
      user: two users, likewise.
      category: two categories of merchants, likewise.
      travel: two cities that were announced for travel, likewise.
      history: the four most recent payments, in the order of the week.
    """

    number: Name
    limit: Amount
    home: Name
    card: Pair
    device: Pair
    user: Pair
    category: Pair
    travel: Pair
    history: Annotated[Items[PastPayment], Field(min_length=4, max_length=4)]


class NewPayment(Part):
    """The payment to screen for fraud."""

    day: Day
    city: Name
    amount: Amount
    merchant: Name
    card: Name
    device: Name
    user: Name
    category: Annotated[Name, Field(description=f"such as {', '.join(CATEGORIES[:3])}")]


class ScreeningRequest(EngineRequest):
    """Fields common to the requests for fraud screening.

    Attributes:
      model: the server's model, which is the default, or a loaded adapter.
      stream: must be false.
    """

    model: StrictStr | None = None
    stream: Literal[False] = False


class ScreenRequest(ScreeningRequest):
    """Request to screen one payment for fraud."""

    account: AccountProfile
    payment: NewPayment


class Screening(Part):
    """A payment of a batch to screen, and its account."""

    account: AccountProfile
    payment: NewPayment


class ScreenBatchRequest(ScreeningRequest):
    """Request to screen a batch of payments for fraud."""

    screenings: Annotated[Items[Screening], Field(min_length=1, max_length=MAX_BATCH)]


def user_of(options: dict[str, Any]) -> str:
    """Return the user of a request to screen a payment: its field ``user``, else the account's number.

    A user gets the same version of the model for all requests while a trial runs.
    """
    return options.get("user") or options["account"]["number"]


def fraud_routes(service: Service, link: CanaryClient) -> APIRouter:
    """Return the routes of a server's public port that screen payments for fraud."""
    routes = APIRouter()

    @routes.post(SCREEN_PATH)
    async def screen(body: ScreenRequest, request: Request) -> Response:
        """Judge whether a payment is a fraud: return the decision, its probability and, for a fraud, the reason."""
        screening = {"account": body.account.model_dump(), "payment": body.payment.model_dump()}
        verdict, = await _verdicts(body, request, [screening])
        response = _json(verdict, [verdict])
        if body.model in (None, service.model):  # for the cache, which does not read the body
            response.headers["X-Adapter"] = verdict["adapter"] or ""
        return response

    @routes.post(BATCH_PATH)
    async def screen_batch(body: ScreenBatchRequest, request: Request) -> Response:
        """Judge whether payments are frauds; return a verdict for each, in the order of the payments."""
        verdicts = await _verdicts(body, request, [screening.model_dump() for screening in body.screenings])
        return _json({"screenings": verdicts}, verdicts)

    async def _verdicts(body: ScreeningRequest, request: Request,
                        screenings: list[dict[str, Any]]) -> list[dict[str, Any]]:
        service.check_open()
        body.check_fields()
        named = (body.model_extra or {}).get("user")
        watching = asyncio.ensure_future(gone(request.receive))
        try:
            verdicts = await unless(watching, asyncio.gather(*(
                _verdict(service, link, body, screening, request=request,
                         user=named or screening["account"]["number"])
                for screening in screenings)))
        finally:
            watching.cancel()
        note(request, model=body.model or service.model,
             frauds=sum(verdict["decision"] == FRAUD for verdict in verdicts))
        return verdicts

    return routes


async def _verdict(service: Service, link: CanaryClient, body: ScreeningRequest, screening: dict[str, Any], *,
                   request: Request, user: str) -> dict[str, Any]:
    """Return the verdict on a payment: the decision, the probability of fraud and, for a fraud, the reason.

    Args:
      screening: the account and the payment.
      user: user whose requests all get the same version while a trial runs.
    """
    prompt, start = prompt_of(screening), partial(service.start, request, body)
    # No await between this line and the start of the request: a trial must decide the same for both.
    adapter = service.adapter(body.model) or link.adapter_for(user) or None
    piece = await _only_piece(service, start(prompt, ONE_TOKEN, user=user))
    # Later requests get the same version even if the trial ends.
    same_version = {"user": user, **({"adapter": adapter} if adapter else {})}
    logprobs = {token.utf8.decode(errors="replace"): token.logprob for token in piece.logprobs[0]}
    if not {FRAUD, LEGIT} <= logprobs.keys():
        logprobs = {}
        for label in (FRAUD, LEGIT):
            answer = start(prompt, {}, continuation=label, **same_version)
            logprobs[label] = sum((await _only_piece(service, answer)).score)
    probability = 1 / (1 + math.exp(min(logprobs[LEGIT] - logprobs[FRAUD], 700)))
    verdict = {"decision": FRAUD if probability >= 0.5 else LEGIT, "probability": probability,
               "model": service.model, "adapter": adapter, "weight_version": piece.weight_version}
    if verdict["decision"] == FRAUD:
        answer = start(prompt + CODE_PREFIX, ONE_TOKEN, **same_version)
        verdict["reason"] = _reason(screening, "R0" + (await _only_piece(service, answer)).text)
    return verdict


def _reason(screening: dict[str, Any], code: str) -> dict[str, str] | None:
    """Return the reason for a fraud by the model's reason code, with its evidence; None if the code is unknown."""
    if code not in PATTERNS:
        return None
    return {"code": code, "what": PATTERNS[code], "evidence": evidence_of(screening, code)}


async def _only_piece(service: Service, answer: Answer) -> Piece:
    """Wait for an answer that the engine sends as a single `Piece`, such as that of a request for one token."""
    try:
        return [piece async for batch in pieces(answer) for piece in batch][-1]
    finally:
        service.link.close(answer)


def _json(value: dict[str, Any], verdicts: list[dict[str, Any]]) -> Response:
    versions = sorted({verdict["weight_version"] for verdict in verdicts})
    return Response(msgspec.json.encode(value), media_type="application/json",
                    headers={"X-Weight-Version": ",".join(map(str, versions))})
