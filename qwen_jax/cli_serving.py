"""Subcommands ``serve``, the HTTP server, and ``bench serve``, its load generator."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from typing import Any

import msgspec

from qwen_jax.cli_options import add_command, add_model, add_options, read_options
from qwen_jax.errors import UserError
from qwen_jax.serving.options import CacheOptions, EngineOptions, ServerOptions


def serve(args: argparse.Namespace) -> int:
    import asyncio

    engine, options = read_options(args, EngineOptions), read_options(args, ServerOptions)
    cache = read_options(args, CacheOptions)
    try:
        from qwen_jax.cluster.canary.client import CanaryClient
        from qwen_jax.cluster.composition import extension
        from qwen_jax.serving import server
        from qwen_jax.serving.ipc.logs import set_up_logging
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs the package {error.name}: pip install 'qwen-jax[serve]'") from error
    set_up_logging(options.log_format)
    make_link = partial(server.engine_link, args.model, engine, options, sys.stderr.isatty())
    if args.replicas == 1:
        link = make_link()
    else:
        from qwen_jax.cluster.routing.gpu_assignment import environments
        from qwen_jax.cluster.routing.load_balancer import LoadBalancer

        make_links = [partial(make_link, environment) for environment in environments(args.replicas, engine.tp_size)]
        link = LoadBalancer(make_links, options.max_requests, options.stall_seconds)
    link = CanaryClient(link)
    extend = extension(link, deciding=options.deciding(), fraud=args.fraud, **msgspec.structs.asdict(cache))
    return asyncio.run(server.serve(link, args.model, options, extend))


def run_batch(args: argparse.Namespace) -> int:
    import asyncio
    from pathlib import Path

    options = read_options(args, EngineOptions)
    try:
        from qwen_jax.serving import batch
        from qwen_jax.serving.ipc.engine_client import EngineClient
    except ModuleNotFoundError as error:
        raise UserError(f"batches need the package {error.name}: pip install 'qwen-jax[serve]'") from error
    lines = batch.read_batch(args.input)
    name, done = batch.model_of(lines), batch.answered(args.output)
    model = args.model or name
    if model is None:
        raise UserError("the model must be named: --model MODEL, or in the requests")
    if unknown := done - {line.custom_id for line in lines}:
        raise UserError(f"{args.output} has the answer to {min(unknown)!r}, which is no request of {args.input}: name "
                        "another file")
    left = [line for line in lines if line.custom_id not in done]
    if done:
        print(f"{len(done)} of {len(lines)} requests were answered before", file=sys.stderr)
    if not left:
        return 0
    progress = sys.stderr.isatty()
    link = EngineClient(model, options.keywords(progress), max_requests=batch.MAX_OPEN)
    try:
        with Path(args.output).open("a") as output:
            errors = asyncio.run(batch.run_batch(link, name or model, left, output, progress=progress,
                                                 concurrency=2 * options.max_batch_size))
    except OSError as error:
        raise UserError(f"{args.output} cannot be written: {error.strerror}") from None
    print(f"{len(left)} requests answered, {errors} of them with an error", file=sys.stderr)
    return 1 if errors else 0


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
    if args.requests is None and args.seconds is None:
        args.requests = 200
    load = Load(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Load)})
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


def add_serve(commands: Any) -> None:
    parser = add_command(commands, "serve", serve, "Serve a model over HTTP, with OpenAI's protocol.")
    add_model(parser)
    engine = parser.add_argument_group("engine")
    add_options(engine, EngineOptions)
    engine.add_argument("--replicas", type=int, default=1, metavar="N", help="engines behind one address, each in a "
                         "process of its own, on --tp-size devices (default: 1)")
    add_options(parser.add_argument_group("server"), ServerOptions)
    add_options(parser.add_argument_group("cache of responses"), CacheOptions)
    parser.add_argument_group("fraud service").add_argument(
        "--fraud", action="store_true", help="routes that screen card payments, for the bundled model and its adapters "
        "(docs/fraud_service.md)")


def add_run_batch(commands: Any) -> None:
    parser = add_command(commands, "run-batch", run_batch, "Answer a file of requests in OpenAI's batch format. A run "
                         "that was interrupted goes on where it was.")
    parser.add_argument("input", metavar="IN.jsonl", help='lines of {"custom_id": ..., "url": ..., "body": ...}')
    parser.add_argument("output", metavar="OUT.jsonl", help="file to which each answer is appended when it is there")
    parser.add_argument("--model", metavar="MODEL", help="folder, hub id or bundled (default: the one that the "
                        "requests name)")
    add_options(parser.add_argument_group("engine"), EngineOptions)


def add_bench(commands: Any) -> None:
    measured = commands.add_parser("bench", help="Measure a server.").add_subparsers(required=True, metavar="WHAT")
    load = add_command(measured, "serve", bench_serve, "Put an open-loop load on an OpenAI-compatible server, and "
                       "measure latencies, throughput and goodput.")
    load.add_argument("url", help="URL of the server, such as http://localhost:8000")
    load.add_argument("--rate", default="inf", metavar="R[,R...]", help="requests per second, arriving by a Poisson "
                      "process; several rates for a sweep, inf (the default) for all requests at once")
    load.add_argument("--requests", type=int, metavar="N", help="requests at each rate (default: 200)")
    load.add_argument("--seconds", type=float, metavar="S", help="seconds for which requests arrive, in place of their "
                      "number")
    load.add_argument("--endpoint", choices=["chat", "completions"], default="chat", help="route that is asked "
                      "(default: chat)")
    load.add_argument("--words", type=int, default=128, metavar="N", help="words of each synthetic prompt (default: "
                      "128)")
    load.add_argument("--prompts", metavar="FILE", help='JSONL in place of synthetic prompts: {"prompt": ...} or '
                      '{"messages": [...]}')
    load.add_argument("--max-tokens", type=int, default=64, metavar="N", help="most tokens of an answer (default: 64)")
    load.add_argument("--ignore-eos", action="store_true", help="answers of exactly that length, where servers can")
    load.add_argument("--slo", metavar="ttft=MS,tpot=MS,e2e=MS", help="some of these limits; goodput counts the "
                      "requests that meet all of them")
    load.add_argument("--warmup", type=int, default=4, metavar="N", help="requests sent first and not counted "
                      "(default: 4)")
    load.add_argument("--seed", type=int, metavar="N", help="seed of arrivals and prompts (default: a random one)")
    load.add_argument("--model", metavar="NAME", help="name of the model (default: the first that the server lists)")
    load.add_argument("--api-key", metavar="KEY", help="the server's API key")
    load.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds for one request (default: 600)")
    load.add_argument("--picture", metavar="FILE.png", help="distributions of latencies; of a sweep, figures by rate")
    load.add_argument("--json", action="store_true", help="one JSON object per rate on stdout, the table on stderr")
