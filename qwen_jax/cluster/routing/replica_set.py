"""Changes of a balancer's engines while requests flow: how many there are, which ones, and weights that one tries."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from qwen_jax.cluster.routing.load_balancer import Balancer
from qwen_jax.cluster.routing.replica import Member
from qwen_jax.errors import UserError
from qwen_jax.serving.ipc.engine_client import EngineLink
from qwen_jax.serving.ipc.errors import ApiError

logger = logging.getLogger(__name__)
Make = Callable[[], EngineLink]


async def resize(balancer: Balancer, count: int, make: Make, drain_seconds: float) -> None:
    """So that there are ``count`` engines, starting or ready. Those that were given up are made anew, and those with
    the fewest requests end first."""
    for member in [one for one in balancer.members if one.keeper.done() and not one.retiring]:
        await balancer.forget(member)
        await balancer.add(make)
    there = [member for member in balancer.members if not member.retiring]
    for _ in range(count - len(there)):
        await balancer.add(make)
    spare = sorted((one for one in there if not one.on_trial), key=lambda one: (one.alive, len(one.sent)))
    leaving = spare[:max(len(there) - count, 0)]
    await asyncio.gather(*(balancer.retire(member, drain_seconds) for member in leaving))


async def replace_all(balancer: Balancer, make: Make, surge: bool, drain_seconds: float) -> None:
    """Other engines, one after another, in the place of all that there are.

    surge: a new one is started before an old one ends, so that there is one more meanwhile; else the other way round,
      which needs a second engine that answers in the meantime.

    UserError when a new engine says why it cannot be; the old ones that are left stay.
    """
    for old in list(balancer.members):
        if not surge:
            await balancer.retire(old, drain_seconds)
        new = await balancer.add(make)
        while not new.ready:
            await asyncio.sleep(0.05)
            new = next((one for one in balancer.members if one.keeper is new.keeper), new)  # started again
            if new.link.refused:
                await balancer.forget(new)
                raise UserError(new.link.refused)
        if surge and old in balancer.members:
            await balancer.retire(old, drain_seconds)


async def begin_trial(balancer: Balancer, update: Sequence[Any], drain_seconds: float) -> Member:
    """One engine gets other weights (``update``: as for the worker's ``update_weights``), once it has ended what it
    has. From then on it gets what is asked with ``on_trial`` and nothing else.

    ApiError when there is no second engine, UserError when the weights are refused; then nothing has changed.
    """
    alive = [member for member in balancer.members if member.alive]
    if len(alive) < 2:
        raise ApiError(409, "a trial of weights takes one engine of several: there is no second one")
    if any(member.on_trial for member in alive):
        raise ApiError(409, "other weights are on trial: end that first, with DELETE")
    member = min(alive, key=lambda one: len(one.sent))
    member.ready = False
    try:
        await balancer.drain(member, drain_seconds)
        await member.link.call("update_weights", *update, patient=True)
        member.on_trial, member.has_previous = True, False
    finally:
        member.ready = not member.retiring
    return member


async def end_trial(balancer: Balancer, update: Sequence[Any] | None) -> None:
    """``update``: what was tried, which all get now; UserError when one of them refuses it, and nobody has it then.
    None: its engine goes back to what the others have."""
    on_trial = [member for member in balancer.members if member.on_trial]
    try:
        if update is None:
            await _take_back(on_trial)
            return
        others = [member for member in balancer.members if member.alive and not member.on_trial]
        try:
            await balancer.tell_all(others, "update_weights", *update)
        except (UserError, ApiError):
            await _take_back(on_trial)
            raise
        for member in on_trial:
            member.has_previous = True
    finally:
        for member in on_trial:
            member.on_trial = False


async def _take_back(members: Sequence[Member]) -> None:
    for member in members:
        if member.alive:  # one that died begins with what the others have
            await member.link.call("rollback")
