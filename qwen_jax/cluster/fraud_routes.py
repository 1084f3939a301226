"""Screening of card payments: a payment and its account as JSON, in the words the model was trained on, to a verdict.

The verdict is one prefill: how likely ``fraud`` and ``legit`` are as the first word of the answer. Only for a fraud
there is a second request, for the one token that makes its reason code; the evidence is read off the fields that the
code names, so it cannot be invented.
"""

from __future__ import annotations

import asyncio
import math
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from qwen_jax.cluster.canary.client import TrialLink
from qwen_jax.evaluation.fraud.accounts import CATEGORIES, DAYS, PATTERNS
from qwen_jax.evaluation.fraud.request import evidence_of, prompt_of
from qwen_jax.serving.http.protocol import Body, Number
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.http.streaming import gone, note, unless
from qwen_jax.serving.ipc.engine_client import Answer, Link, pieces
from qwen_jax.serving.ipc.messages import Piece

FRAUD, LEGIT = "fraud", "legit"
MOST_AT_ONCE = 64
FIRST_TOKEN = {"max_tokens": 1, "temperature": 0.0, "logprobs": 4}
CODE_BEGINS = f"{FRAUD} R0"  # of an answer; one digit makes it a code

Name = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9._-]{1,32}$", examples=["Kalmart"])]
Word = Annotated[StrictStr, Field(pattern=r"^[a-z]{1,16}$", examples=["approved"])]
Amount = Annotated[StrictInt, Field(ge=0, le=10_000_000, examples=[436])]
Day = Literal[*DAYS]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ItemStatus(_Part):
    """``standing``: what became of it, in the upstream system's word, such as active or lost."""

    name: Name
    standing: Word


Pair = Annotated[list[ItemStatus], Field(min_length=2, max_length=2)]


class PastPayment(_Part):
    day: Day
    city: Name
    amount: Amount
    status: Annotated[Word, Field(description="approved or declined")]
    merchant: Name
    claim: Annotated[Word, Field(description="settled or disputed")]


class AccountProfile(_Part):
    """What is known of an account before the payment.

    Attributes:
      limit: of one payment, in whole units of the currency, as all amounts (the bundled model knows 100 to 999).
      card, device, user, category, travel: one in force and one that is not, in any order.
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
    history: Annotated[list[PastPayment], Field(min_length=4, max_length=4)]


class NewPayment(_Part):
    day: Day
    city: Name
    amount: Amount
    merchant: Name
    card: Name
    device: Name
    user: Name
    category: Annotated[Name, Field(description=f"such as {', '.join(CATEGORIES[:3])}")]


class ScreeningRequest(Body):
    """``model``: the server's by default, or a loaded adapter."""

    model: StrictStr | None = None
    priority: Annotated[StrictInt, Field(ge=-2**30, le=2**30)] = 0
    timeout: Annotated[Number, Field(gt=0, le=86400)] | None = None
    stream: Literal[False] = False


class ScreenRequest(ScreeningRequest):
    account: AccountProfile
    payment: NewPayment


class Screened(_Part):
    account: AccountProfile
    payment: NewPayment


class ScreenBatchRequest(ScreeningRequest):
    screenings: Annotated[list[Screened], Field(min_length=1, max_length=MOST_AT_ONCE)]


def fraud_routes(service: Service) -> APIRouter:
    """For a server's own port."""
    routes = APIRouter()

    @routes.post("/fraud/screen")
    async def screen(body: ScreenRequest, request: Request) -> Response:
        """Whether a payment is fraudulent: the decision, how probable fraud is, and for a fraud the reason."""
        verdict, = await _answered(body, request, [{"account": body.account.model_dump(),
                                                    "payment": body.payment.model_dump()}])
        answer = _json(verdict, [verdict])
        if body.model in (None, service.model):  # the cache, which has to know who answered, reads no bodies
            answer.headers["X-Adapter"] = verdict["adapter"] or ""
        return answer

    @routes.post("/fraud/screen/batch")
    async def screen_batch(body: ScreenBatchRequest, request: Request) -> Response:
        """The same of several payments, in their order."""
        verdicts = await _answered(body, request, [one.model_dump() for one in body.screenings])
        return _json({"screenings": verdicts}, verdicts)

    async def _answered(body: ScreeningRequest, request: Request, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
        service.check_open()
        body.check_fields()
        user = (body.model_extra or {}).get("user")
        watching = asyncio.ensure_future(gone(request.receive))
        try:
            verdicts = await unless(watching, asyncio.gather(*(
                _verdict(service, body, user or one["account"]["number"], one) for one in asked)))
        finally:
            watching.cancel()
        note(request, model=body.model or service.model, frauds=sum(one["decision"] == FRAUD for one in verdicts))
        return verdicts

    return routes


async def _verdict(service: Service, body: ScreeningRequest, user: str, asked: dict[str, Any]) -> dict[str, Any]:
    """user: all of whose requests get the same version where one is on trial."""
    prompt = prompt_of(asked)
    # No await until the request is on its way: the trial decides likewise.
    adapter = service.adapter(body.model) or adapter_on_trial(service.link, user) or None
    piece = await _ended(service, service.start(body, prompt, FIRST_TOKEN, user=user))
    same = {"user": user, **({"adapter": adapter} if adapter else {})}  # version, whatever becomes of a trial
    likely = {text: value for text, value, *_ in piece.logprobs[0][2]}
    if not {FRAUD, LEGIT} <= likely.keys():
        scored = [await _ended(service, service.start(body, prompt, {}, continuation=label, **same))
                  for label in (FRAUD, LEGIT)]
        likely = {label: sum(one.score) for label, one in zip((FRAUD, LEGIT), scored)}
    probability = 1 / (1 + math.exp(min(likely[LEGIT] - likely[FRAUD], 700)))
    verdict = {"decision": FRAUD if probability >= 0.5 else LEGIT, "probability": probability,
               "model": service.model, "adapter": adapter, "weight_version": piece.weight_version}
    if verdict["decision"] == FRAUD:
        answer = service.start(body, prompt + CODE_BEGINS, FIRST_TOKEN, **same)
        verdict["reason"] = _reason(asked, "R0" + (await _ended(service, answer)).text)
    return verdict


def _reason(asked: dict[str, Any], code: str) -> dict[str, str] | None:
    """None when the model names no code that there is."""
    return {"code": code, "what": PATTERNS[code], "evidence": evidence_of(asked, code)} if code in PATTERNS else None


def adapter_on_trial(link: Link, user: str) -> str | None:
    """Which adapter this user's requests for the base model get: "" for none, None where that cannot be told."""
    if not isinstance(link, TrialLink) or link.canary is None or not link.canary.weight:
        return ""
    if not link.of_adapter:  # other weights
        return None
    return link.canary.name if link.canary.gets(user) else ""


async def _ended(service: Service, answer: Answer) -> Piece:
    """The only piece of a prefill."""
    try:
        return [piece async for some in pieces(answer) for piece in some][-1]
    finally:
        service.link.close(answer)


def _json(value: dict[str, Any], verdicts: list[dict[str, Any]]) -> Response:
    versions = sorted({verdict["weight_version"] for verdict in verdicts})
    return Response(msgspec.json.encode(value), media_type="application/json",
                    headers={"X-Weight-Version": ",".join(map(str, versions))})
