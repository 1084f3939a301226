"""The one loop that joins schedulers, programs and text: requests in, steps, answers out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sized

from qwen_jax.engine.compiled.state import StepOutput
from qwen_jax.engine.core.counters import Counters, Usage
from qwen_jax.engine.core.input_batch import build_batch
from qwen_jax.engine.core.replica import Replica
from qwen_jax.engine.frontend.request import Request
from qwen_jax.engine.scheduling.decode_adaptation import Adaptation
from qwen_jax.engine.scheduling.schedule_policy import SPARSE
from qwen_jax.engine.scheduling.scheduler import Scheduler
from qwen_jax.engine.scheduling.sequence import MOST, Sequence, State
from qwen_jax.engine.scheduling.speculation import Speculation
from qwen_jax.engine.scheduling.step_plan import StepPlan
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.engine.weights.weight_store import VersionedWeights
from qwen_jax.errors import UserError

logger = logging.getLogger(__name__)
POLL_SECONDS = 1e-4  # between looks at which of several replicas is done
DISPATCH_SECONDS = 0.05  # a decode step generates as many tokens per row as fit into this: it delays whoever comes


class EngineCore:
    """`submit` requests and call `step` until they are closed. One thread at a time.

    While devices work on a step, the texts of the step before it are made. So a request may be finished (its pages are
    free) and not yet closed (its output is incomplete): the next step closes it. Where there are several replicas, each
    has a step under way, and `step` ends the first that is done.
    """

    def __init__(self, replicas: Sized[Replica], weights: VersionedWeights, adapters: AdapterTable,
                 speculation: Speculation | None = None, adaptation: Adaptation | None = None) -> None:
        self.replicas, self.weights, self.adapters, self.speculation = list(replicas), weights, adapters, speculation
        runner, scheduler = replicas[0].runner, replicas[0].scheduler
        self.counters = Counters({bucket: Usage() for bucket in runner.table})
        self.failure: BaseException | None = None
        self.clock = time.monotonic  # of deadlines
        self.before_step: Callable[[], None] | None = None  # what may reshard
        self.refuses: str | None = None  # why no requests are taken here
        self.adaptation = adaptation
        self._slots, self._vocab_size = scheduler.limits.max_batch_size, weights.config.vocab_size
        self._requests: dict[int, Request] = {}
        self.homes: dict[int | str, Replica] = {}  # of the requests

    def submit(self, requests: Iterable[Request], version: int | None = None) -> None:
        """Queue what `InputProcessor` made, by default for the current version of the weights; `step` works on it."""
        if self.refuses:
            raise UserError(self.refuses)
        if not all(replica.runner.ready for replica in self.replicas):
            raise UserError("the engine is not warmed up: call warmup() first")
        for request in requests:
            sequence = request.sequence
            request.adapter = self.adapters.acquire(request.adapter_name)
            self._use(request, self.weights.current if version is None else version)
            if request.score_from is not None:  # logits are needed from the position before on
                sequence.reusable = request.score_from - 1
            if request.pooling == "mean":  # hidden states of all tokens
                sequence.reusable = 0
            home = min(self.replicas, key=lambda replica: replica.scheduler.num_sequences)
            home.scheduler.add(sequence)
            self._requests[sequence.request_id], self.homes[sequence.request_id] = request, home
            self.counters.prompt_tokens += len(sequence.prompt)

    def abort(self, request_id: int) -> bool:
        """End a request and free its pages at once; False when it is not there any more."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        home = self.homes[request_id]
        self._deliver(home)  # which closes it when it has ended already
        if not home.scheduler.abort(request_id):
            return False
        self._close(request)
        return True

    def withdraw(self, request: Request) -> None:
        """Takes a request out that has not begun, as if it had never been submitted."""
        sequence = request.sequence
        if request.begun:
            raise ValueError(f"request {sequence.request_id!r} has begun")
        self.homes.pop(sequence.request_id).scheduler.withdraw(sequence)
        del self._requests[sequence.request_id]
        self.adapters.release(request.adapter)
        self.counters.prompt_tokens -= len(sequence.prompt)

    def step(self) -> bool:
        """Run one step for whatever is queued. Returns whether there was work."""
        if self.failure:
            raise RuntimeError("the engine stopped after a failed step; make a new one") from self.failure
        self._abort_expired()
        if self.before_step:
            self.before_step()
        self._share_out()
        try:
            for replica in self.replicas:
                if replica.under_way is None:
                    self._begin(replica)
            delivered = [self._deliver(replica) for replica in self.replicas]
            busy = [replica for replica in self.replicas if replica.under_way is not None]
            if busy:
                self._end(_first_done(busy))
        except BaseException as error:  # the state was given away to the step: nothing can continue from here
            self.failure = error
            raise
        return bool(busy) or any(delivered)

    def settle(self) -> None:
        """Ends and delivers what is under way."""
        try:
            for replica in self.replicas:
                if replica.under_way is not None:
                    self._deliver(replica)
                    self._end(replica)
                self._deliver(replica)
        except BaseException as error:
            self.failure = self.failure or error
            raise

    def _abort_expired(self) -> None:
        now = self.clock()
        for replica in self.replicas:
            for sequence in replica.scheduler.expired(now):
                self.abort(sequence.request_id)

    def _share_out(self) -> None:
        """A replica without work takes over the first in line of the longest queue."""
        for replica in self.replicas:
            if not replica.scheduler.has_work:
                longest = max(self.replicas, key=lambda other: len(other.scheduler.waiting))
                if longest.scheduler.waiting and longest.scheduler.running:
                    sequence = longest.scheduler.waiting[0]
                    longest.scheduler.withdraw(sequence)
                    replica.scheduler.add(sequence)
                    self.homes[sequence.request_id] = replica

    def _begin(self, replica: Replica) -> None:
        began = time.perf_counter()
        steps = DISPATCH_SECONDS / (replica.step_seconds or DISPATCH_SECONDS)
        propose, rows = self.speculation and self.speculation.propose, MOST
        if self.adaptation:
            choice = self.adaptation.choose(*replica.scheduler.crowd())
            steps, rows = choice.steps, choice.rows
        plan = replica.scheduler.plan(max(1, int(steps)), propose, rows)
        if plan is not None:
            batch = build_batch(plan, self._requests, self._slots, self._vocab_size)
            now = time.monotonic()
            for row in plan.rows:
                times = self._requests[row.seq.request_id].output.times
                times.started = times.started or now
            started = time.perf_counter()
            replica.under_way = plan, replica.runner.start(plan.bucket, batch, plan.version), began, started

    def _end(self, replica: Replica) -> None:
        plan, started, began, start = replica.under_way
        output = replica.runner.finish(started)
        ready = time.perf_counter()
        replica.under_way = None
        self._commit(replica, plan, output)
        self._account(replica, plan, output, ready - start, start - began + time.perf_counter() - ready)

    def complete(self, requests: Sized[Request], version: int | None = None) -> None:
        """Submit requests and run until all of them are closed; whatever interrupts takes them out again."""
        try:
            self.submit(requests, version)
            while not all(request.closed for request in requests):
                self.step()
        finally:
            for request in requests:
                self.abort(request.sequence.request_id)

    def restart(self, requests: Iterable[Request], version: int) -> None:
        """Let open requests of which nothing has been handed out begin again, with this version of the weights."""
        self.settle()
        for request in requests:
            if not request.closed:
                self.homes[request.sequence.request_id].scheduler.restart(request.sequence)
                request.forget()
                self._use(request, version)

    def untouched(self, only_waiting: bool) -> list[Request]:
        """Open requests of which nobody has seen anything yet; or only those that have not begun at all."""
        self.settle()
        return [request for request in self._requests.values() if request.sequence.state is not State.FINISHED and (
            not request.begun if only_waiting else not request.streams)]

    def versions_in_use(self) -> set[int]:
        return {request.sequence.version for request in self._requests.values()}

    # --- after a step

    def _commit(self, replica: Replica, plan: StepPlan, output: StepOutput) -> None:
        """Tokens into their sequences, whose pages are free at once when they end; their texts come later."""
        taken, stopped = [], []
        trips = output.trips.tolist()
        for row, tokens, count, trip in zip(plan.rows, output.sampled.tokens.tolist(), output.counts.tolist(), trips,
                                            strict=False):
            request = self._requests.get(row.seq.request_id)
            if trip:
                taken.append(None)
                continue
            tokens = tokens[:count] if row.samples and request else []
            end = request.ends_at(tokens) if tokens else None
            if end is not None:
                tokens = tokens[:end]
                stopped.append((row.seq, "stop"))
            if tokens and (reason := request.follow_grammar(tokens)):
                stopped.append((row.seq, reason))
            taken.append(tokens)
        replica.scheduler.commit(plan, taken)
        for sequence, reason in stopped:
            replica.scheduler.finish(sequence, reason)
        for row, trip in zip(plan.rows, trips, strict=False):
            if trip and row.seq.state is not State.FINISHED:
                self._fall_back(replica.scheduler, row.seq, trip - 1)
        replica.undelivered = plan, output, taken
        if any(row.seq.request_id in self._requests and self._requests[row.seq.request_id].stops_at_text
               for row in plan.rows):
            self._deliver(replica)  # whether a stop string has appeared decides who runs next

    def _fall_back(self, scheduler: Scheduler, sequence: Sequence, layer: int) -> None:
        """A row's numbers were of no use: once more in 16 bits, or the end."""
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
        """Hands the results of a replica's last step to its requests. Returns whether there were any."""
        if replica.undelivered is None:
            return False
        (plan, output, taken), replica.undelivered = replica.undelivered, None
        sparse, now = plan.bucket.schedule == SPARSE, time.monotonic()
        for index, (row, tokens) in enumerate(zip(plan.rows, taken, strict=True)):
            request = self._requests.get(row.seq.request_id)
            if request is None:  # an error ended it while this step was under way
                continue
            if tokens is None:
                if row.seq.state is State.FINISHED:
                    self._close(request)
                continue
            if sparse:
                request.add_pages(*map(int, output.pages[index]))
            try:
                if output.prompt is not None and request.score_from is not None:
                    request.add_prompt_scores(row.start, *(array[index, : row.count] for array in output.prompt))
                if output.pooled is not None and request.pooling:
                    request.add_pooled(row.start, row.count, output.pooled[index])
                if tokens:
                    times = request.output.times
                    times.first_token, times.last_token = times.first_token or now, now
                    if request.add_tokens(tokens, output.sampled, index):
                        replica.scheduler.finish(row.seq, "stop")
            except Exception as error:  # what one request's text does to us is that request's affair alone
                logger.exception("request %s failed", row.seq.request_id)
                request.output.error = f"{type(error).__name__}: {error}"
                replica.scheduler.finish(row.seq, "error")
            if row.seq.state is State.FINISHED:
                self._close(request)
        return True

    def _close(self, request: Request) -> None:
        request.deltas.append(request.close())
        request.output.times.ended = time.monotonic()
        self.adapters.release(request.adapter)
        del self._requests[request.sequence.request_id], self.homes[request.sequence.request_id]
        if request.sequence.version != self.weights.current:
            self.weights.drop_unused(self.versions_in_use())
        self.counters.finished[request.output.finish_reason] += 1
        if request.output.schedule:
            self.counters.schedules[request.output.schedule] += 1

    def _use(self, request: Request, version: int) -> None:
        sequence = request.sequence
        sequence.version = version
        sequence.salt = repr((version, self.adapters.identity(request.adapter),
                              self.replicas[0].scheduler.attention(sequence))).encode()

    def _account(self, replica: Replica, plan: StepPlan, output: StepOutput, device: float, host: float) -> None:
        self.counters.record(plan, output, device, host)
        if self.speculation:
            self.speculation.record(plan, output.counts[: len(plan.rows)].tolist(), device + host)
        if self.adaptation:
            self.adaptation.record(plan, device + host)
        if plan.bucket.phase == "decode" and plan.bucket.tokens == 1:
            replica.step_seconds = device / max(row.count for row in plan.rows)


def _first_done(busy: Sized[Replica]) -> Replica:
    """The replica whose step has ended, or ends first; of several the one that was started first."""
    busy = sorted(busy, key=lambda replica: replica.under_way[3])
    while len(busy) > 1:
        for replica in busy:
            if replica.runner.done(replica.under_way[1]):
                return replica
        time.sleep(POLL_SECONDS)
    return busy[0]
