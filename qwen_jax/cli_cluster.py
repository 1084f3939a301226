"""The command line's part about clusters."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_jax.errors import UserError

# Serve's own proxy takes some 200 requests per second, HAProxy thousands. Read by Ray when its processes start.
PROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
POLL_SECONDS, UNREACHABLE_SECONDS = 0.5, 60.0
OBJECT_STORE_BYTES = 100_000_000  # of shared memory, of which hardly any is used: engines are talked to by TCP


def _modules() -> tuple[Any, Any]:
    try:
        import ray
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        import qwen_jax.serving.server  # noqa: F401  and what it needs
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    return ray, ServeSubmissionClient


def _missing(error: ModuleNotFoundError) -> UserError:
    return UserError(f"a cluster needs the package {error.name}: pip install 'qwen-jax[serve,ray]'")


def _client(address: str | None) -> Any:
    """Of the dashboard of a running cluster."""
    if "RAY_AUTH_MODE" not in os.environ and Path("~/.ray/auth_token").expanduser().exists():
        os.environ["RAY_AUTH_MODE"] = "token"  # which clusters that Ray starts ask for; read when it is imported
    address = address or os.environ.get("RAY_DASHBOARD_ADDRESS") or "http://127.0.0.1:8265"
    _, client = _modules()
    try:
        return client(address)
    except Exception as error:  # whatever its HTTP client raises
        raise UserError(f"no Ray cluster answers at {address}: {error}") from error


def up(args: argparse.Namespace) -> int:
    try:
        from qwen_jax.cluster.ray_serve.config import read_config, serve_config
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    config = read_config(args.config)
    wanted = serve_config(config)
    if args.print:
        import yaml

        print(yaml.safe_dump(wanted, sort_keys=False), end="")
        return 0
    own = args.address is None
    if own:
        ray, submission = _modules()
        os.environ.update({name: os.environ.get(name, value) for name, value in PROXY.items()})
        context = ray.init(address="local", include_dashboard=True, dashboard_port=args.dashboard_port,
                           num_cpus=args.num_cpus, object_store_memory=OBJECT_STORE_BYTES,
                           log_to_driver=args.engine_logs, configure_logging=False)
        # What Ray has started is to end too. Afterwards, because Ray sets a handler of its own.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        print(f"Ray runs on this machine, its dashboard at http://{context.dashboard_url}", file=sys.stderr)
        client = submission(f"http://{context.dashboard_url}")
    else:
        client = _client(args.address)
    try:
        _deploy(client, wanted)
        url = _url(args.address, config.server.host, config.server.port)
        _wait(client, url, args.quiet)
        print(json.dumps({"url": url}) if args.json else f"ready: {url}", flush=True)
        while own:
            time.sleep(3600)
    finally:
        if own:
            ray.shutdown()
    return 0


def _deploy(client: Any, wanted: dict[str, Any]) -> None:
    try:
        client.deploy_applications(wanted)
    except RuntimeError as error:  # with a traceback of the dashboard's
        lines = [line for line in str(error).splitlines() if line.strip()]
        alerts = [line for line in lines if "[ALERT]" in line]  # the proxy's, such as an address that is in use
        raise UserError(f"Ray Serve does not start: {(alerts or lines[-1:])[0].strip()}") from error


def _state(client: Any) -> tuple[str, str]:
    """Of the application: Serve's word for it, and a sentence where there is one."""
    found = client.get_serve_details().get("applications", {}).get("qwen-jax")
    if not found:
        return "NOT_STARTED", ""
    said = " ".join(one["message"] for one in found["deployments"].values() if one["message"])
    return found["status"], said or found["message"]


def _wait(client: Any, url: str, quiet: bool) -> None:
    began, told, seen = time.monotonic(), None, time.monotonic()
    while True:
        state, message = _state(client)
        if state == "DEPLOY_FAILED":
            raise UserError(f"the cluster does not start: {_cause(message)}")
        if state != "RUNNING" or (found := _engines(url)):
            seen = time.monotonic()
        elif time.monotonic() - seen > UNREACHABLE_SECONDS:
            raise UserError(f"it runs, and {url} does not answer from here: how it goes cannot be said")
        if state == "RUNNING" and found and not found["changing"]:
            if found["problem"]:
                raise UserError(f"the cluster stays as it was: {found['problem']}")
            return
        state = "changing" if state == "RUNNING" else state.lower().replace("_", " ")
        if not quiet and state != told:
            print(f"{time.monotonic() - began:.0f} s: {state}", file=sys.stderr)
            told = state
        time.sleep(POLL_SECONDS)


def _url(address: str | None, host: str, port: int) -> str:
    """Of the server. An address that means every one, or this machine's own, is taken for the dashboard's."""
    if address and host in ("0.0.0.0", "::", "127.0.0.1"):
        host = urllib.parse.urlsplit(address).hostname or host
    return f"http://{host}:{port}"


def _engines(url: str) -> dict[str, Any] | None:
    """What the gateway says; None where it is not reached, such as behind a proxy that does not know it yet."""
    try:
        with urllib.request.urlopen(f"{url}/cluster", timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None


def _cause(message: str) -> str:
    """The sentence of a UserError inside a traceback, or all of it."""
    marks = [line for line in message.splitlines() if "UserError: " in line]
    return marks[-1].split("UserError: ", 1)[1] if marks else message


def status(args: argparse.Namespace) -> None:
    client = _client(args.address)
    state, message = _state(client)
    options = client.get_serve_details().get("http_options") or {}
    found = _engines(_url(args.address, options.get("host") or "127.0.0.1", options.get("port") or 8000))
    engines = found["engines"] if found else []
    if args.json:
        print(json.dumps({"state": state, "message": message, "engines": engines}))
        return
    print(f"{state}{': ' if message else ''}{message}")
    for one in engines:
        said = "ends" if one["retiring"] else "on trial" if one["on_trial"] else "ready" if one["ready"] else "starts"
        print(f"{one['name']}: {said}, {one['requests']} requests")


def down(args: argparse.Namespace) -> None:
    _client(args.address).delete_applications()


def add_cluster(commands: Any) -> None:
    within = commands.add_parser("cluster", help="Engines on the nodes of a Ray cluster.").add_subparsers(
        required=True, metavar="WHAT")

    def command(name: str, run: Callable[[argparse.Namespace], Any], text: str) -> argparse.ArgumentParser:
        made = within.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        made.add_argument("--address", metavar="URL", help="of a running cluster's dashboard, such as "
                          "http://head:8265")
        made.add_argument("--json", action="store_true")
        return made

    text = ("Start what a file describes, or change what runs into that: without --address on a Ray of its own on this "
            "machine, until Ctrl-C.")
    starting = command("up", up, text)
    starting.add_argument("config", metavar="FILE.yaml")
    starting.add_argument("--print", action="store_true", help="what `serve deploy` takes, and start nothing")
    starting.add_argument("--num-cpus", type=int, metavar="N", help="that Ray may give away (default: all)")
    starting.add_argument("--dashboard-port", type=int, default=8265, metavar="P")
    starting.add_argument("--engine-logs", action="store_true", help="on stderr too; they are in Ray's folder anyway")
    starting.add_argument("--quiet", action="store_true")
    command("status", status, "How it is.")
    command("down", down, "End it; Ray stays.")
