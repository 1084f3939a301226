"""`EngineThread` with an engine that does nothing: limits, aborts, calls between steps, failures, and idling."""
import itertools
import threading
import time
from types import SimpleNamespace

import pytest

from qwen_jax.engine.core.engine_thread import EngineBusy, EngineDead, EngineThread
from qwen_jax.errors import UserError


def new_request(steps=3):
    """A request that `Core` closes after a number of steps."""
    return SimpleNamespace(sequence=SimpleNamespace(request_id=next(new_request.ids)), left=steps, begun=False,
                           closed=False)


new_request.ids = itertools.count()


class Core:
    """Stand-in for `EngineCore`, in which the first two requests make progress in each step."""

    def __init__(self):
        self.requests, self.failure, self.steps, self.gate = {}, None, 0, threading.Event()
        self.gate.set()

    def submit(self, requests, version=None):
        for request in requests:
            if request.left == 0:
                raise UserError("no adapter named x")
            self.requests[request.sequence.request_id] = request

    def abort(self, request_id):
        request = self.requests.pop(request_id, None)
        if request:
            request.closed = True
        return request is not None

    def withdraw(self, request):
        del self.requests[request.sequence.request_id]

    def step(self):
        self.gate.wait(10)
        self.steps += 1
        if self.failure:
            raise self.failure
        for number, request in list(self.requests.items())[:2]:
            request.begun = True
            request.left -= 1
            if not request.left:
                request.closed = True
                del self.requests[number]


class Record:
    """Listener that remembers what it was told."""

    def __init__(self):
        self.steps, self.aborts, self.errors, self.ended = 0, [], [], threading.Event()

    def after_step(self, requests):
        self.steps += 1
        if all(request.closed for request in requests):
            self.ended.set()

    def aborted(self, requests):
        self.aborts += requests
        self.ended.set()

    def failed(self, error):
        self.errors.append(error)
        self.ended.set()

    def wait(self):
        assert self.ended.wait(10)
        return self


@pytest.fixture
def core():
    return Core()


@pytest.fixture
def make(core):
    threads = []

    def start(**options):
        threads.append(EngineThread(core, **options))
        threads[-1].start()
        return threads[-1]

    yield start
    core.gate.set()
    for thread in threads:
        thread.close()


def test_requests_run_to_their_end_and_the_hook_follows_every_step(make, core):
    hooks = []
    thread, record = make(after_step=lambda: hooks.append(core.steps)), Record()
    thread.submit(lambda: [new_request(3), new_request(5)], record)
    assert record.wait().steps == 5 and not record.errors
    thread.complete([new_request(2)])
    assert thread.between_steps(lambda: hooks) == list(range(1, core.steps + 1)) and core.steps == 7


def test_an_idle_engine_makes_no_step_and_uses_no_processor_time(make, core):
    thread = make()
    thread.complete([new_request()])
    steps, seconds = core.steps, time.process_time()
    time.sleep(0.3)
    assert core.steps == steps and time.process_time() - seconds < 0.05


def test_a_place_is_free_as_soon_as_a_request_is_aborted_or_refused(make, core):
    thread, records = make(max_requests=1), [Record() for _ in range(4)]
    core.gate.clear()
    running = thread.submit(lambda: [new_request()], records[0])
    with pytest.raises(EngineBusy, match="1 requests are queued or running"):
        thread.submit(lambda: [new_request()], records[1])
    thread.abort(running)
    refused = thread.submit(lambda: [new_request(0)], records[2])
    core.gate.set()
    assert records[2].wait().errors and str(records[2].errors[0]) == "no adapter named x"
    thread.abort(refused)
    thread.submit(lambda: [new_request()], records[3])
    assert records[3].wait().steps == 3


def test_an_abort_while_a_request_is_being_prepared(make, core):
    thread, record, began, go_on = make(), Record(), threading.Event(), threading.Event()

    def prepare():
        began.set()
        go_on.wait(10)
        return [new_request()]

    submission = thread.submit(prepare, record)
    assert began.wait(10)
    thread.abort(submission)
    go_on.set()
    thread.complete([new_request()])
    assert record.steps == 0 and not record.aborts and not record.errors and not core.requests


def test_no_request_waits_for_the_grammars_of_others(make):
    thread, go_on, slow = make(), threading.Event(), [Record() for _ in range(5)]
    for record in slow:
        thread.submit(lambda: go_on.wait(10) and [new_request()], record, grammar=True)
    thread.submit(lambda: [new_request()], record := Record())
    assert record.wait().steps == 3 and not any(other.steps for other in slow)
    go_on.set()
    assert all(other.wait().steps >= 3 for other in slow)


def test_an_abort_of_what_runs_and_an_error_of_preparing(make, core):
    thread, running, bad = make(), Record(), Record()
    submission = thread.submit(lambda: [new_request(1), new_request(10**9)], running)
    while running.steps < 5:
        time.sleep(0.001)
    thread.abort(submission)
    assert [request.left > 0 for request in running.wait().aborts] == [True]  # the other one had ended
    thread.submit(lambda: 1 / 0, bad)
    assert isinstance(bad.wait().errors[0], ZeroDivisionError) and not thread.failure


def test_a_panic_while_preparing_is_told_and_frees_the_place(make):
    class Panic(BaseException):
        """Stands for a panic in Rust code."""

    def panic():
        raise Panic

    thread, record = make(max_requests=1), Record()
    thread.submit(panic, record)
    assert isinstance(record.wait().errors[0], Panic)
    thread.submit(lambda: [new_request()], record := Record())
    assert record.wait().steps == 3


def test_requests_that_no_step_has_worked_on_are_withdrawn_from_the_end(make, core):
    thread, records = make(), [Record() for _ in range(6)]
    core.gate.clear()
    for record in records:
        thread.submit(lambda: [new_request(10**9)], record)
        while len(core.requests) < 1:  # the first is in a step now, which waits
            time.sleep(0.001)
    core.gate.set()
    while len(core.requests) < 6:
        time.sleep(0.001)
    waiting = thread.between_steps(lambda: [request.begun for request in core.requests.values()]).count(False)
    assert waiting == 4
    withdrawn = thread.withdraw(3).result(10)
    assert len(withdrawn) == 3 and all(record.steps for record in records if record not in withdrawn)
    assert len(thread.withdraw(9).result(10)) == 1 and len(core.requests) == 2


def test_a_failed_step_is_told_to_all_that_is_open(make, core):
    thread, records, began, go_on = make(), [Record(), Record()], threading.Event(), threading.Event()
    core.gate.clear()
    thread.submit(lambda: [new_request()], records[0])
    while not core.requests:
        time.sleep(0.001)
    thread.submit(lambda: (began.set(), go_on.wait(10), [new_request()])[2], records[1])
    call = thread.call(lambda: None)
    assert began.wait(10)
    core.failure = RuntimeError("the device is gone")
    core.gate.set()
    for record in records:
        assert isinstance(record.wait().errors[0], EngineDead) and "the device is gone" in str(record.errors[0])
    with pytest.raises(EngineDead, match="the device is gone"):
        call.result(10)
    go_on.set()
    with pytest.raises(EngineDead, match="the device is gone"):
        thread.submit(lambda: [new_request()], Record())
    with pytest.raises(EngineDead):
        thread.complete([new_request()])
    assert thread.drain().result(1) is None and [len(record.errors) for record in records] == [1, 1]


def test_a_call_that_panics_leaves_the_engine_running(make):
    class Panic(BaseException):
        """Stands for a panic in Rust code."""

    def panic():
        raise Panic

    thread = make()
    with pytest.raises(Panic):
        thread.between_steps(panic)
    assert thread.between_steps(lambda: 7) == 7 and not thread.failure


def test_a_step_follows_every_call_while_requests_run(make, core):
    thread, record = make(), Record()
    submission = thread.submit(lambda: [new_request(10**9)], record)
    while not record.steps:
        time.sleep(0.001)
    calls = [thread.call(lambda: core.steps) for _ in range(30)]
    steps = [call.result(10) for call in calls]
    assert steps == sorted(set(steps))
    thread.abort(submission)
    record.wait()
    assert [thread.call(lambda: core.steps).result(10) for _ in range(3)] == [core.steps] * 3


def test_a_listener_that_raises_ends_its_own_requests(make, core):
    class Broken(Record):
        def after_step(self, requests):
            super().after_step(requests)
            raise ZeroDivisionError

    thread, broken, other = make(), Broken(), Record()
    thread.submit(lambda: [new_request(10**9)], broken)
    thread.submit(lambda: [new_request(20)], other)
    assert isinstance(broken.wait().errors[0], ZeroDivisionError) and broken.steps == 1
    assert other.wait().steps == 20 and not core.requests and not thread.failure


def test_a_call_that_breaks_the_engine_ends_the_thread(make, core):
    thread = make()
    assert thread.between_steps(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        thread.between_steps(lambda: 1 / 0)

    def breaks():
        core.failure = ValueError("half replaced")
        raise core.failure

    with pytest.raises(ValueError, match="half replaced"):
        thread.between_steps(breaks)
    with pytest.raises(EngineDead, match="half replaced"):
        thread.between_steps(lambda: 7)


def test_a_drained_engine_takes_no_requests_and_ends_those_it_has(make, core):
    thread, record = make(), Record()
    core.gate.clear()
    thread.submit(lambda: [new_request()], record)
    drained = thread.drain()
    with pytest.raises(EngineBusy, match="draining"):
        thread.submit(lambda: [new_request()], Record())
    assert not drained.done()
    core.gate.set()
    assert drained.result(10) is None and record.wait().steps == 3
    thread.complete([new_request()])  # golden prompts of an update may still run


def test_closing_aborts_what_runs(make, core):
    thread, record = make(), Record()
    thread.submit(lambda: [new_request(10**9)], record)
    while not record.steps:
        time.sleep(0.001)
    thread.close()
    thread.close()
    assert "the engine was closed" in str(record.errors[0]) and not core.requests
    with pytest.raises(EngineDead, match="the engine was closed"):
        thread.between_steps(lambda: 7)
