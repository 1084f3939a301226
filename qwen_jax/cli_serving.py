"""The command line's part about servers: ``serve`` and ``bench serve``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from qwen_jax.errors import UserError


def serve(args: argparse.Namespace) -> int:
    import asyncio

    try:
        from qwen_jax.cluster.canary.client import TrialLink
        from qwen_jax.cluster.composition import extension
        from qwen_jax.serving import server
        from qwen_jax.serving.http.limits import read_keys
        from qwen_jax.serving.ipc.logs import set_up_logging
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs the package {error.name}: pip install 'qwen-jax[serve]'") from error
    set_up_logging(args.log_format)
    engine = {"dtype": args.dtype, "max_batch_size": args.max_batch_size, "max_seq_len": args.max_seq_len,
              "tp_size": args.tp_size, "fp8_enabled": args.fp8, "max_adapters": args.max_adapters,
              "kv_cache_bytes": args.kv_cache_bytes, "progress": sys.stderr.isatty()}
    options = server.ServerOptions(
        args.host, args.port, args.served_model_name, args.max_requests, args.stall_seconds, args.drain_seconds,
        args.max_body_bytes, read_keys(args.api_keys, "QWEN_JAX_API_KEYS"), args.admin_port, args.admin_host,
        read_keys(args.admin_keys, "QWEN_JAX_ADMIN_KEYS"), args.log_format, args.log_prompts, args.otlp_endpoint,
        args.share_weights)
    if args.replicas == 1:
        link = server.engine_link(args.model, engine, options)
    else:
        from qwen_jax.cluster.routing.gpu_assignment import environments
        from qwen_jax.cluster.routing.load_balancer import Balancer

        makers = [partial(server.engine_link, args.model, engine, options, environment)
                  for environment in environments(args.replicas, args.tp_size)]
        link = Balancer(makers, args.max_requests, args.stall_seconds)
    link = TrialLink(link)
    computed = {name: engine[name] for name in ("dtype", "fp8_enabled", "max_seq_len", "tp_size")}
    extend = extension(link, args.response_cache_mb, args.response_cache_seconds, args.redis_url, computed,
                       args.fraud)
    return asyncio.run(server.serve(link, args.model, options, extend))


def bench_serve(args: argparse.Namespace) -> None:
    try:
        import uvloop

        from qwen_jax.serving.load_test.client import run
        from qwen_jax.serving.load_test.report import as_text, check_picture, parse_slo, picture, summarize
        from qwen_jax.serving.load_test.workload import Load, parse_rates
    except ModuleNotFoundError as error:
        raise UserError(f"the load generator needs the package {error.name}: pip install 'qwen-jax[serve]'") from error
    rates, slo = parse_rates(args.rate), parse_slo(args.slo) if args.slo else None
    if args.picture:
        check_picture(args.picture)
    requests = 200 if args.requests is None and args.seconds is None else args.requests
    load = Load(requests, args.seconds, args.words, args.prompts, args.max_tokens, args.ignore_eos, args.endpoint,
                args.warmup, args.seed, args.model, args.api_key, args.timeout)
    runs = []
    for rate in rates:
        outcomes = uvloop.run(run(args.url, load, rate, progress=sys.stderr.isatty() or not args.json))
        runs.append((summarize(outcomes, rate, slo), outcomes))
        if args.json:
            print(json.dumps(runs[-1][0]), flush=True)
    print(as_text([summary for summary, _ in runs]), file=sys.stderr if args.json else sys.stdout)
    if args.picture:
        picture(runs, args.picture, args.url)
        print(args.picture, file=sys.stderr)


def add_serving(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """commands: the parser's; command: adds one with a function and a sentence."""
    serving = command("serve", serve, "Serve a model over HTTP, with OpenAI's protocol.")
    serving.add_argument("model")
    serving.add_argument("--host", default="127.0.0.1")
    serving.add_argument("--port", type=int, default=8000)
    serving.add_argument("--served-model-name", metavar="NAME", help="what clients call the model (default: MODEL)")
    serving.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    serving.add_argument("--max-batch-size", type=int, default=64)
    serving.add_argument("--max-seq-len", type=int)
    serving.add_argument("--kv-cache-bytes", type=int)
    serving.add_argument("--tp-size", type=int, default=1)
    serving.add_argument("--replicas", type=int, default=1, metavar="N", help="engines in processes of their own, on "
                        "TP_SIZE devices each, behind one address")
    serving.add_argument("--fp8", action="store_true", help="8-bit weights and KV cache")
    serving.add_argument("--max-adapters", type=int, default=0, metavar="N", help="LoRA adapters loaded at once")
    serving.add_argument("--max-requests", type=int, default=1024, metavar="N", help="open at once; more get 429")
    serving.add_argument("--max-body-bytes", type=int, default=4 << 20, metavar="N")
    serving.add_argument("--stall-seconds", type=float, default=60, help="without a step until /health fails")
    serving.add_argument("--drain-seconds", type=float, default=300, help="for running requests to end after SIGTERM")
    serving.add_argument("--api-keys", metavar="FILE", help="one key per line (default: those in QWEN_JAX_API_KEYS)")

    serving.add_argument("--admin-port", type=int, metavar="P", help="for other weights while it runs (default: none)")
    serving.add_argument("--admin-host", default="127.0.0.1", metavar="H")
    serving.add_argument("--admin-keys", metavar="FILE", help="as --api-keys, for it (default: QWEN_JAX_ADMIN_KEYS)")
    serving.add_argument("--response-cache-mb", type=float, default=64, metavar="N", help="for answers that were given "
                        "before, to exactly the same deterministic request (default 64; 0 for none)")
    serving.add_argument("--response-cache-seconds", type=float, default=3600, metavar="S", help="that they are kept")
    serving.add_argument("--redis-url", metavar="URL", help="of a second level of that cache, for several servers")
    serving.add_argument("--fraud", action="store_true", help="with routes that screen card payments, for the bundled "
                         "model and its adapters (docs/fraud_service.md)")
    serving.add_argument("--share-weights", action="store_true", help="decode a converted checkpoint once for all "
                        "servers of this machine, into shared memory")
    serving.add_argument("--log-format", choices=["text", "json"], default="text")
    serving.add_argument("--log-prompts", action="store_true", help="with every request's prompt")
    serving.add_argument("--otlp-endpoint", metavar="URL", help="where OpenTelemetry traces go, such as "
                        "http://localhost:4318/v1/traces")

    bench = commands.add_parser("bench", help="Measure.").add_subparsers(required=True, metavar="WHAT")
    text = "Put an open-loop load on an OpenAI-compatible server, and measure latencies, throughput and goodput."
    load = bench.add_parser("serve", help=text, description=text)
    load.set_defaults(run=bench_serve)
    load.add_argument("url", help="of the server, such as http://localhost:8000")
    load.add_argument("--rate", default="inf", metavar="R[,R...]", help="requests per second, arriving by a Poisson "
                      "process; several for a sweep, inf (the default) for all at once")
    load.add_argument("--requests", type=int, metavar="N", help="of each rate (default 200)")
    load.add_argument("--seconds", type=float, metavar="S", help="for which requests arrive, in place of their number")
    load.add_argument("--endpoint", choices=["chat", "completions"], default="chat")
    load.add_argument("--words", type=int, default=128, metavar="N", help="of each synthetic prompt (default 128)")
    load.add_argument("--prompts", metavar="FILE", help='JSONL in their place: {"prompt": ...} or {"messages": [...]}')
    load.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of each answer (default 64)")
    load.add_argument("--ignore-eos", action="store_true", help="answers of exactly that length, where servers can")
    load.add_argument("--slo", metavar="ttft=MS,tpot=MS,e2e=MS", help="some of these; goodput is what meets all")
    load.add_argument("--warmup", type=int, default=4, metavar="N", help="requests first, not counted (default 4)")
    load.add_argument("--seed", type=int, help="the same arrivals and prompts again")
    load.add_argument("--model", metavar="NAME", help="default: the first that the server lists")
    load.add_argument("--api-key", metavar="KEY")
    load.add_argument("--timeout", type=float, default=600, metavar="S", help="for one request (default 600)")
    load.add_argument("--picture", metavar="FILE.png", help="distributions of latencies; of a sweep, figures by rate")
    load.add_argument("--json", action="store_true", help="one JSON object per rate on stdout, the table on stderr")
