"""Subcommands of ``qwen-jax cluster``, which run engines on a Ray cluster: up, status, down."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

from qwen_jax.cli_options import add_command
from qwen_jax.errors import UserError

# Ray Serve's own proxy takes some 200 requests per second, HAProxy thousands. Ray reads these when its processes start.
PROXY_ENVIRONMENT = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
POLL_SECONDS, UNREACHABLE_SECONDS = 0.5, 60.0
OBJECT_STORE_BYTES = 100_000_000  # little, since the gateway talks to engines over TCP


def _modules() -> tuple[Any, Any]:
    """Import and return Ray and the class of clients of its dashboard. UserError when a package is missing."""
    try:
        import ray
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        import qwen_jax.serving.server  # noqa: F401  and the packages that it needs
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    return ray, ServeSubmissionClient


def _missing(error: ModuleNotFoundError) -> UserError:
    return UserError(f"a cluster needs the package {error.name}: pip install 'qwen-jax[serve,ray]'")


def _client(address: str | None) -> Any:
    """Return a client of a running Ray cluster's dashboard, by its URL (default: RAY_DASHBOARD_ADDRESS, or local)."""
    if "RAY_AUTH_MODE" not in os.environ and Path("~/.ray/auth_token").expanduser().exists():
        os.environ["RAY_AUTH_MODE"] = "token"  # clusters that Ray starts ask for one; read when Ray is imported
    address = address or os.environ.get("RAY_DASHBOARD_ADDRESS") or "http://127.0.0.1:8265"
    _, client = _modules()
    try:
        return client(address)
    except Exception as error:  # of many types, from its HTTP client
        raise UserError(f"no Ray cluster answers at {address}: {error}") from error


def up(args: argparse.Namespace) -> int:
    """Start the cluster of engines that a file describes, or change a running one to it; return the exit code.

    Without ``--address``, Ray is started on this machine and ends with this process.
    """
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
        ray, make_client = _modules()
        os.environ.update({name: os.environ.get(name, value) for name, value in PROXY_ENVIRONMENT.items()})
        context = ray.init(address="local", include_dashboard=True, dashboard_port=args.dashboard_port,
                           num_cpus=args.num_cpus, object_store_memory=OBJECT_STORE_BYTES,
                           log_to_driver=args.engine_logs, configure_logging=False)
        # So that SIGTERM also ends the processes of Ray. After `init`, because Ray sets a handler of its own.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        print(f"Ray runs on this machine, its dashboard at http://{context.dashboard_url}", file=sys.stderr)
        client = make_client(f"http://{context.dashboard_url}")
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
    except RuntimeError as error:  # its text has a traceback of the dashboard
        lines = [line for line in str(error).splitlines() if line.strip()]
        alerts = [line for line in lines if "[ALERT]" in line]  # of the proxy, such as an address in use
        raise UserError(f"Ray Serve does not start: {(alerts or lines[-1:])[0].strip()}") from error


def _state(client: Any) -> tuple[str, str]:
    """Return the state of the cluster's Ray Serve application, such as "RUNNING", and a message, perhaps empty."""
    application = client.get_serve_details().get("applications", {}).get("qwen-jax")
    if not application:
        return "NOT_STARTED", ""
    messages = [deployment["message"] for deployment in application["deployments"].values()]
    return application["status"], " ".join(filter(None, messages)) or application["message"]


def _wait(client: Any, url: str, quiet: bool) -> None:
    """Wait until the cluster runs with its new configuration; UserError when it does not start or change."""
    began, shown, seen = time.monotonic(), None, time.monotonic()
    while True:
        state, message = _state(client)
        if state == "DEPLOY_FAILED":
            raise UserError(f"the cluster does not start: {_cause(message)}")
        if state != "RUNNING" or (gateway := _engines(url)):
            seen = time.monotonic()
        elif time.monotonic() - seen > UNREACHABLE_SECONDS:
            raise UserError(f"the cluster is running, but {url} is not reachable from this machine: open the port, or "
                            "run this command on the head node")
        if state == "RUNNING" and gateway and not gateway["changing"]:
            if gateway["problem"]:
                raise UserError(f"the cluster stays as it was: {gateway['problem']}")
            return
        state = "changing" if state == "RUNNING" else state.lower().replace("_", " ")
        if not quiet and state != shown:
            print(f"{time.monotonic() - began:.0f} s: {state}", file=sys.stderr)
            shown = state
        time.sleep(POLL_SECONDS)


def _url(address: str | None, host: str, port: int) -> str:
    """Return the URL of the cluster's HTTP server.

    A ``host`` that means all addresses or the local machine is replaced by that of the dashboard, ``address``.
    """
    if address and host in ("0.0.0.0", "::", "127.0.0.1"):
        host = urllib.parse.urlsplit(address).hostname or host
    return f"http://{host}:{port}"


def _engines(url: str) -> dict[str, Any] | None:
    """Return the state of the engines as ``/cluster`` of the gateway at ``url`` shows it; None if not reached."""
    import urllib.request  # takes a fifth of the command line's start

    try:
        with urllib.request.urlopen(f"{url}/cluster", timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None


def _cause(message: str) -> str:
    """Return the message of the last UserError in a traceback's text, or the whole text without one."""
    sentences = [line for line in message.splitlines() if "UserError: " in line]
    return sentences[-1].split("UserError: ", 1)[1] if sentences else message


def status(args: argparse.Namespace) -> None:
    client = _client(args.address)
    state, message = _state(client)
    options = client.get_serve_details().get("http_options") or {}
    gateway = _engines(_url(args.address, options.get("host") or "127.0.0.1", options.get("port") or 8000))
    engines = gateway["engines"] if gateway else []
    if args.json:
        print(json.dumps({"state": state, "message": message, "engines": engines}))
        return
    print(f"{state}{': ' if message else ''}{message}")
    for engine in engines:
        condition = ("ends" if engine["retiring"] else "on trial" if engine["on_trial"] else
                     "ready" if engine["ready"] else "starts")
        print(f"{engine['name']}: {condition}, {engine['requests']} requests")


def down(args: argparse.Namespace) -> None:
    _client(args.address).delete_applications()


def add_cluster(commands: Any) -> None:
    within = commands.add_parser("cluster", help="Engines on the nodes of a Ray cluster.").add_subparsers(
        required=True, metavar="WHAT")
    starting = add_command(within, "up", up, "Start the cluster that a file describes, or change a running one: "
                           "without --address on a Ray of its own on this machine, until Ctrl-C.")
    starting.add_argument("config", metavar="FILE.yaml", help="description of the cluster")
    starting.add_argument("--print", action="store_true", help="only the configuration that `serve deploy` takes; "
                          "nothing is started")
    starting.add_argument("--num-cpus", type=int, metavar="N", help="CPU cores for Ray to assign (default: all)")
    starting.add_argument("--dashboard-port", type=int, default=8265, metavar="P", help="port of Ray's dashboard "
                          "(default: 8265)")
    starting.add_argument("--engine-logs", action="store_true", help="logs of the engines on stderr too, beside those "
                          "in Ray's folder")
    starting.add_argument("--quiet", action="store_true", help="no progress on stderr")
    for parser in (starting, add_command(within, "status", status, "Show the state of the cluster and its engines."),
                   add_command(within, "down", down, "End the engines and the gateway; Ray stays.")):
        parser.add_argument("--address", metavar="URL", help="dashboard of a running cluster, such as http://head:8265")
        parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
