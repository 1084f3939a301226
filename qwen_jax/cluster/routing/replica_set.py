"""Changes of a load balancer's replicas while requests flow: their number, other engines, other weights on trial."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from qwen_jax.cluster.routing.load_balancer import POLL_SECONDS, LoadBalancer
from qwen_jax.cluster.routing.replica import Replica
from qwen_jax.errors import UserError
from qwen_jax.serving.ipc.engine_client import EngineClient
from qwen_jax.serving.ipc.errors import ApiError

MakeLink = Callable[[], EngineClient]


async def resize(balancer: LoadBalancer, count: int, make_link: MakeLink, drain_seconds: float) -> None:
    """Start or retire engines until there are ``count`` of them, starting or ready.

    Replicas that were given up are started anew. The replicas with the fewest requests retire first.
    """
    given_up = [replica for replica in balancer.replicas if replica.supervisor.done() and not replica.retiring]
    for replica in given_up:
        await balancer.remove(replica)
        await balancer.add(make_link)
    staying = [replica for replica in balancer.replicas if not replica.retiring]
    for _ in range(count - len(staying)):
        await balancer.add(make_link)
    candidates = sorted((replica for replica in staying if not replica.on_trial),
                        key=lambda replica: (replica.alive, len(replica.pending)))
    leaving = candidates[:max(len(staying) - count, 0)]
    await asyncio.gather(*(balancer.retire(replica, drain_seconds) for replica in leaving))


async def replace_all(balancer: LoadBalancer, make_link: MakeLink, surge: bool, drain_seconds: float) -> None:
    """Replace all engines by new ones, one after another.

    Args:
      surge: start a new engine before its predecessor ends, which needs free devices for one more engine. Otherwise the
        predecessor ends first, which needs a second engine that answers in the meantime.

    Raises:
      UserError: a new engine refuses its options. The engines that are not yet replaced stay.
    """
    for old in list(balancer.replicas):
        if not surge:
            await balancer.retire(old, drain_seconds)
        new = await balancer.add(make_link)
        while not new.ready:
            await asyncio.sleep(POLL_SECONDS)
            # The same supervisor may have started it again, as another replica.
            new = next((replica for replica in balancer.replicas if replica.supervisor is new.supervisor), new)
            if new.link.refused:
                await balancer.remove(new)
                raise UserError(new.link.refused)
        if surge and old in balancer.replicas:
            await balancer.retire(old, drain_seconds)


async def begin_trial(balancer: LoadBalancer, update: Sequence[Any], drain_seconds: float) -> Replica:
    """Begin a trial: load other weights into the replica with the fewest requests, once these have ended; return it.

    From then on it gets the requests with the option ``on_trial`` and no others.

    Args:
      update: arguments of the engine's call ``update_weights``.

    Raises:
      ApiError: there is no second engine, or other weights are on trial.
      UserError: the engine refuses the weights. Then nothing has changed.
    """
    alive = [replica for replica in balancer.replicas if replica.alive]
    if len(alive) < 2:
        raise ApiError(409, f"ready engines for a trial of weights must be at least 2, not {len(alive)}: start more "
                       "replicas, or wait for them")
    if any(replica.on_trial for replica in alive):
        raise ApiError(409, "other weights are on trial: end that first, with DELETE /admin/canary")
    replica = min(alive, key=lambda replica: len(replica.pending))
    replica.ready = False
    try:
        await balancer.drain(replica, drain_seconds)
        await replica.link.call("update_weights", *update, patient=True)
        replica.on_trial, replica.has_previous = True, False
    finally:
        replica.ready = not replica.retiring
    return replica


async def end_trial(balancer: LoadBalancer, update: Sequence[Any] | None) -> None:
    """End a trial of weights: give them to all replicas, or take them back from the replica that has them.

    Args:
      update: arguments of the engine's call ``update_weights``, which made the weights on trial, to give them to all
        replicas. None to take them back.

    Raises:
      UserError: a replica refuses the update; then they are taken back.
    """
    on_trial = [replica for replica in balancer.replicas if replica.on_trial]
    try:
        if update is None:
            await _roll_back(on_trial)
            return
        others = [replica for replica in balancer.replicas if replica.alive and not replica.on_trial]
        try:
            await balancer.call_all(others, "update_weights", *update)
        except (UserError, ApiError):
            await _roll_back(on_trial)
            raise
        for replica in on_trial:
            replica.has_previous = True
    finally:
        for replica in on_trial:
            replica.on_trial = False


async def _roll_back(replicas: Sequence[Replica]) -> None:
    for replica in replicas:
        if replica.alive:  # a replica that died starts with the weights of the others
            await replica.link.call("rollback")
