"""The engine's loop: plans a step, runs its program on the devices and gives the results to the requests."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from qwen_jax.engine.core.counters import Counters, Usage
from qwen_jax.engine.core.input_batch import build_batch
from qwen_jax.engine.core.replica import FinishedStep, Replica, RunningStep
from qwen_jax.engine.frontend.request import Request
from qwen_jax.engine.scheduling.decode_adaptation import DecodeAdaptation
from qwen_jax.engine.scheduling.schedule_policy import SPARSE
from qwen_jax.engine.scheduling.sequence import PlannedRow, State, StepPlan
from qwen_jax.engine.scheduling.speculation import Speculation
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.engine.weights.weight_store import VersionedWeights
from qwen_jax.errors import UserError

logger = logging.getLogger(__name__)
POLL_SECONDS = 1e-4  # between looks at which of several replicas is done
WAIT_SECONDS = 0.01  # between looks for work where no request can run
DISPATCH_SECONDS = 0.05  # a decode step generates as many tokens per row as fit into this: it delays new requests


class EngineCore:
    """Engine loop that runs requests on the replicas of a model, step by step. One thread at a time may call it.

    `submit` queues requests, `step` works on them, and a request is closed when its output is complete. While devices
    work on a step, the results of the step before it reach their requests. So a request may be finished (its pages are
    free) and not yet closed: the next step closes it. With several replicas each has a step running, and `step` ends
    the first that is done.

    Args:
      speculation: guesses tokens that decode steps check. adaptation: chooses the size of decode steps.
      before_step: called between two steps; it may replace the replicas.
      refusal: why this process takes no requests, if it does not.
    """

    def __init__(self, replicas: Sequence[Replica], weights: VersionedWeights, adapters: AdapterTable, *,
                 speculation: Speculation | None = None, adaptation: DecodeAdaptation | None = None,
                 before_step: Callable[[], None] | None = None, refusal: str | None = None) -> None:
        self.replicas, self.weights, self.adapters = list(replicas), weights, adapters
        self.speculation, self.adaptation = speculation, adaptation
        self.clock = time.monotonic  # that deadlines refer to
        self.failure: BaseException | None = None  # of a step, after which no other can run
        self._before_step, self.refusal = before_step, refusal
        self._slots, self._vocab_size = replicas[0].scheduler.limits.max_batch_size, weights.config.vocab_size
        self._requests: dict[int, Request] = {}
        self._replica_of: dict[int | str, Replica] = {}  # by request id
        self.counters = Counters({bucket: Usage() for bucket in replicas[0].runner.table})

    # --- requests

    def submit(self, requests: Iterable[Request], version: int | None = None) -> None:
        """Queue requests, by default for the current version of the weights. UserError if the engine takes none."""
        if self.refusal:
            raise UserError(self.refusal)
        if not all(replica.runner.ready for replica in self.replicas):
            raise UserError("the engine is not warmed up: call warmup() first")
        for request in requests:
            sequence = request.sequence
            if request.adapter_name is not None:
                request.adapter_slot = self.adapters.acquire(request.adapter_name)
            self._assign_version(request, self.weights.current if version is None else version)
            replica = min(self.replicas, key=lambda replica: replica.scheduler.num_sequences)
            replica.scheduler.add(sequence)
            self._requests[sequence.request_id], self._replica_of[sequence.request_id] = request, replica
            self.counters.prompt_tokens += len(sequence.prompt)

    def abort(self, request_id: int) -> bool:
        """End a request and free its pages at once. Returns False when it has ended already."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        replica = self._replica_of[request_id]
        self._deliver(replica)  # closes the request if its last step has ended
        if not replica.scheduler.abort(request_id):
            return False
        self._close(request)
        return True

    def withdraw(self, request: Request) -> None:
        """Take out a request that has not begun, as if it had never been submitted."""
        sequence = request.sequence
        if request.begun:
            raise ValueError(f"request {sequence.request_id!r} has begun")
        self._replica_of.pop(sequence.request_id).scheduler.withdraw(sequence)
        del self._requests[sequence.request_id]
        self._release_adapter(request)
        self.counters.prompt_tokens -= len(sequence.prompt)

    def complete(self, requests: Sequence[Request], version: int | None = None) -> None:
        """Submit requests and run steps until all of them are closed. After an exception they are aborted."""
        try:
            self.submit(requests, version)
            while not all(request.closed for request in requests):
                self.step()
        finally:
            for request in requests:
                self.abort(request.sequence.request_id)

    def close(self, reason: str) -> None:
        """Refuse all requests from now on; ``reason`` says why."""
        self.refusal = reason

    # --- a step

    def step(self) -> bool:
        """Start a step on each idle replica, and end the first that is done. Returns whether there was work."""
        self._prepare_step()
        with self._stops_on_failure():
            for replica in self.replicas:
                if replica.running is None and (planned := self._plan(replica)):
                    self._start(replica, *planned)
            delivered = [self._deliver(replica) for replica in self.replicas]  # of the last steps, while devices work
            replica = _first_done([replica for replica in self.replicas if replica.running])
            if replica:
                self._commit(replica, self._wait(replica))
        worked = replica is not None or any(delivered)
        if not worked and self._requests:  # they wait for a program that is still being compiled
            time.sleep(WAIT_SECONDS)
        return worked

    def settle(self) -> None:
        """Wait for the running steps of all replicas, and give the results to their requests."""
        with self._stops_on_failure():
            for replica in self.replicas:
                self._deliver(replica)
                if replica.running:
                    self._commit(replica, self._wait(replica))
                    self._deliver(replica)

    def _prepare_step(self) -> None:
        """Abort requests past their deadline, call ``before_step``, and move waiting requests to idle replicas."""
        if self.failure:
            raise RuntimeError("the engine stopped after a failed step; make a new one") from self.failure
        now = self.clock()
        for replica in self.replicas:
            for sequence in replica.scheduler.expired(now):
                self.abort(sequence.request_id)
        if self._before_step:
            self._before_step()
        for replica in self.replicas:
            if not replica.scheduler.has_work:
                self._take_waiting(replica)

    def _take_waiting(self, replica: Replica) -> None:
        """Move the first waiting request of the replica with the longest queue to an idle ``replica``."""
        longest = max((other.scheduler for other in self.replicas), key=lambda scheduler: len(scheduler.waiting))
        if longest.waiting and longest.running:
            sequence = longest.waiting[0]
            longest.withdraw(sequence)
            replica.scheduler.add(sequence)
            self._replica_of[sequence.request_id] = replica

    def _plan(self, replica: Replica) -> tuple[StepPlan, float] | None:
        """Choose the bucket and rows of the replica's next step. Returns the plan and when planning began, or None."""
        began = time.perf_counter()
        propose = self.speculation and self.speculation.propose
        if self.adaptation:
            choice = self.adaptation.choose(*replica.scheduler.decode_load())
            plan = replica.scheduler.plan(choice.steps, propose, choice.rows)
        else:
            steps = int(DISPATCH_SECONDS / (replica.step_seconds or DISPATCH_SECONDS))
            plan = replica.scheduler.plan(max(1, steps), propose)
        return plan and (plan, began)

    def _start(self, replica: Replica, plan: StepPlan, planned_at: float) -> None:
        """Start the program of a plan on the replica's devices."""
        batch = build_batch(plan, self._requests, self._slots, self._vocab_size)
        now = time.monotonic()
        for row in plan.rows:
            times = self._requests[row.seq.request_id].output.times
            times.started = times.started or now
        started_at = time.perf_counter()
        handle = replica.runner.start(plan.bucket, batch, plan.version)
        replica.running = RunningStep(plan, handle, planned_at, started_at)

    def _wait(self, replica: Replica) -> FinishedStep:
        """Wait for the replica's running step; return it with each row's sampled tokens up to the end of its answer."""
        step, replica.running = replica.running, None
        output = replica.runner.finish(step.handle)
        ready_at = time.perf_counter()
        sampled = zip(output.trips.tolist(), output.sampled.tokens.tolist(), output.counts.tolist(), strict=True)
        counted = [None if trip else self._counted(row, tokens[:count])
                   for row, (trip, tokens, count) in zip(step.plan.rows, sampled, strict=False)]
        return FinishedStep(step.plan, step, output, counted, ready_at)

    def _counted(self, row: PlannedRow, tokens: list[int]) -> list[int]:
        """Return the tokens sampled for a row, up to the first that ends its request's answer."""
        request = self._requests.get(row.seq.request_id)
        return request.up_to_end(tokens) if row.samples and request else []

    def _commit(self, replica: Replica, step: FinishedStep) -> None:
        """Append a finished step's tokens to their sequences, finish sequences that stop, and free their pages.

        Decoding the tokens to text is left to `_deliver`.
        """
        replica.scheduler.commit(step.plan, step.tokens)
        for index, (row, tokens) in enumerate(zip(step.plan.rows, step.tokens, strict=True)):
            if tokens is None:
                self._fall_back(replica, row, int(step.output.trips[index]) - 1)
            elif tokens and (reason := self._requests[row.seq.request_id].end_after(tokens)):
                replica.scheduler.finish(row.seq, reason)
        replica.undelivered = step
        if any(row.seq.request_id in self._requests and self._requests[row.seq.request_id].stops_at_text
               for row in step.plan.rows):
            self._deliver(replica)  # whether a stop string has appeared decides who runs next
        self._account(replica, step)

    def _fall_back(self, replica: Replica, row: PlannedRow, layer: int) -> None:
        """Have a sequence with unusable numbers computed again in 16 bits; if it was already, end it with an error.

        layer: the first in which its numbers were unusable.
        """
        sequence, scheduler = row.seq, replica.scheduler
        if sequence.state is State.FINISHED:
            return
        self.counters.trips[layer] += 1
        if scheduler.wide_pool is not None and not sequence.wide:
            logger.info("request %s is computed again in 16 bits: its numbers left the range of 8 bits in layer %d",
                        sequence.request_id, layer)
            scheduler.fall_back(sequence)
            return
        request = self._requests[sequence.request_id]
        request.output.error = f"what it computes is not finite or has damaged scales, first in layer {layer}"
        scheduler.finish(sequence, "error")

    def _deliver(self, replica: Replica) -> bool:
        """Give the results of a replica's last finished step to its requests. Returns whether there were any."""
        step, replica.undelivered = replica.undelivered, None
        if step is None:
            return False
        for index, (row, tokens) in enumerate(zip(step.plan.rows, step.tokens, strict=True)):
            request = self._requests.get(row.seq.request_id)
            if request is None:  # an abort has closed it since
                continue
            if tokens is not None:
                self._add_results(replica, request, step, index)
            if row.seq.state is State.FINISHED:
                self._close(request)
        return True

    def _add_results(self, replica: Replica, request: Request, step: FinishedStep, index: int) -> None:
        """Add the tokens, log-probabilities and hidden states of one row of a step to its request.

        An exception, as in decoding text, ends this request alone.
        """
        row, tokens, output = step.plan.rows[index], step.tokens[index], step.output
        try:
            if step.plan.bucket.schedule == SPARSE:
                request.add_pages(*map(int, output.page_counts[index]))
            if output.prompt is not None and request.score_from is not None:
                request.add_prompt_scores(row.start, *(array[index, : row.count] for array in output.prompt))
            if output.pooled is not None and request.pooling:
                request.add_pooled(row.start, row.count, output.pooled[index])
            if tokens and request.add_tokens(tokens, output.sampled, index, time.monotonic()):
                replica.scheduler.finish(row.seq, "stop")
        except Exception as error:
            logger.exception("request %s failed", row.seq.request_id)
            request.output.error = f"{type(error).__name__}: {error}"
            replica.scheduler.finish(row.seq, "error")

    def _close(self, request: Request) -> None:
        """Complete the output of a finished request and forget the request."""
        request.deltas.append(request.close())
        self._release_adapter(request)
        del self._requests[request.sequence.request_id], self._replica_of[request.sequence.request_id]
        if request.sequence.version != self.weights.current:
            self.weights.drop_unused(self.versions_in_use())
        self.counters.closed(request.output)

    def _release_adapter(self, request: Request) -> None:
        if request.adapter_name is not None:
            self.adapters.release(request.adapter_slot)

    def _account(self, replica: Replica, step: FinishedStep) -> None:
        """Report a finished step and its time to the counters, the speculation and the adaptation."""
        plan, running = step.plan, step.running
        device = step.ready_at - running.started_at
        host = running.started_at - running.planned_at + time.perf_counter() - step.ready_at
        self.counters.record(plan, step.output, device, host)
        if self.speculation:
            self.speculation.record(plan, step.output.counts[: len(plan.rows)].tolist(), device + host)
        if self.adaptation:
            self.adaptation.record(plan, device + host)
        if plan.bucket.phase == "decode" and plan.bucket.tokens == 1:
            replica.step_seconds = device / max(row.count for row in plan.rows)

    @contextlib.contextmanager
    def _stops_on_failure(self) -> Iterator[None]:
        """Stop the engine when the ``with`` block raises: the devices' state was donated to a step and is lost."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Stop the engine because of an error: no step runs any more. The first error stays the reason."""
        self.failure = self.failure or error

    # --- versions of the weights, and plans

    def restart(self, requests: Iterable[Request], version: int) -> None:
        """Let open requests begin again with this version of the weights, as if nothing had been generated."""
        self.settle()
        for request in requests:
            if not request.closed:
                self._replica_of[request.sequence.request_id].scheduler.restart(request.sequence)
                request.forget()
                self._assign_version(request, version)

    def untouched(self, only_waiting: bool) -> list[Request]:
        """Return the open requests that may begin again: those not streamed; with ``only_waiting`` those not begun."""
        self.settle()
        return [request for request in self._requests.values() if request.sequence.state is not State.FINISHED and (
            not request.begun if only_waiting else not request.streams)]

    def versions_in_use(self) -> set[int]:
        """Return the versions of the weights that open requests run with."""
        return {request.sequence.version for request in self._requests.values()}

    def go_on_with(self, replicas: Sequence[Replica], replica_of: dict[int | str, Replica]) -> None:
        """Replace the replicas by others that have taken over the open requests. replica_of: by request id."""
        self.replicas, self._replica_of = list(replicas), replica_of

    def _assign_version(self, request: Request, version: int) -> None:
        """Set the version of the weights that a request runs with, and the key by which it shares cached pages."""
        sequence, scheduler = request.sequence, self.replicas[0].scheduler
        sequence.version = version
        scheduler.settle_attention(sequence)
        adapter = self.adapters.identity(request.adapter_slot) if request.adapter_name is not None else 0
        sequence.salt = repr((version, adapter, scheduler.attention(sequence), sequence.cache_salt)).encode()


def _first_done(replicas: list[Replica]) -> Replica | None:
    """Return the replica whose running step is done first, waiting for it where there are several; None without any."""
    replicas = sorted(replicas, key=lambda replica: replica.running.started_at)
    while len(replicas) > 1:
        for replica in replicas:
            if replica.runner.done(replica.running.handle):
                return replica
        time.sleep(POLL_SECONDS)
    return replicas[0] if replicas else None
