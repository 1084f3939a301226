"""Traffic of many users to a server that has weights or adapters on trial."""
import time
from concurrent.futures import ThreadPoolExecutor

ASK = {"model": "bundled", "prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


def asked(server, count, first=0):
    """Send requests of ``count`` users and check that all are answered."""
    def ask(number):
        return server.post("/v1/completions", {**ASK, "user": f"user {number}", "stream": number % 3 == 0})

    with ThreadPoolExecutor(6) as threads:
        assert {one.status_code for one in threads.map(ask, range(first, first + count))} == {200}


def until(admin, state, server, most=40):
    """Send requests until the trial has a state; return their number and what the admin port says."""
    for turn in range(most):
        found = admin.get("/canary").json()
        if found["state"] == state:
            return 12 * turn, found
        asked(server, 12, first=100 * turn)
        time.sleep(0.05)
    raise AssertionError(found)
