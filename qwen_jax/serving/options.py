"""Classes of options of a server, of its engines and of its response cache.

Each option is a field with its type, bounds, default and description. The arguments of ``qwen-jax serve`` and the
sections of a cluster's file are made from these classes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec


def option(description: str, metavar: str | None = None, argument: str | None = None, **bounds: float) -> msgspec.Meta:
    """Return a field's annotation with the description, name and bounds that the command line shows and checks.

    Args:
      description: a noun phrase, for the command line's help.
      metavar: name of the value in that help.
      argument: name on the command line, where it is not the field's own.
      bounds: bounds of a number: `ge`, `gt`, `le` or `lt`.
    """
    return msgspec.Meta(description=description, extra={"metavar": metavar, "argument": argument}, **bounds)


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of groups of options. `structs.convert` checks values that come from a file or a command line."""


class EngineOptions(Options):
    """Options of an engine, which are keywords of ``Engine.from_pretrained``."""

    dtype: Annotated[Literal["bfloat16", "float32"], option(
        "element type of weights and KV cache")] = "bfloat16"
    max_batch_size: Annotated[int, option(
        "sequences that run at once in an engine", "N", ge=1)] = 64
    max_seq_len: Annotated[int, option(
        "tokens of a prompt and its answer together (default: 4096, or the model's context if that is shorter)",
        "N", ge=1)] | None = None
    kv_cache_bytes: Annotated[int, option(
        "bytes of KV pages on each device (default: what full sequences need, at most a share of the free memory)",
        "N", ge=1)] | None = None
    tp_size: Annotated[int, option(
        "devices that divide every layer of an engine among themselves", "N", ge=1)] = 1
    fp8_enabled: Annotated[bool, option(
        "8-bit weights and KV cache", argument="--fp8")] = False
    weights: Annotated[Literal["auto", "int8", "int4"], option(
        "type to which weights are rounded; CPUs then answer few requests two or three times as fast; auto is int8 on "
        "CPUs, and nothing elsewhere")] | None = None
    max_adapters: Annotated[int, option(
        "LoRA adapters loaded at once", "N", ge=0)] = 0
    max_adapter_rank: Annotated[int, option(
        "largest rank of a LoRA adapter", "N", ge=1)] = 16
    batch_invariant: Annotated[bool, option(
        "answers that do not depend, to the last bit, on the requests beside them")] = False

    def keywords(self, progress: bool) -> dict[str, Any]:
        """Return the options as keywords of ``Engine.from_pretrained``.

        Args:
          progress: whether the engine shows progress bars on stderr.
        """
        return {**msgspec.structs.asdict(self), "progress": progress}


MaxRequests = Annotated[int, option(
    "answers open at once, each of a prompt's n counted; requests for more are answered with 429", "N", ge=1)]


# Options of a server that decide whether, when and where a request is answered, but not what the answer says.
WITHOUT_INFLUENCE = frozenset((
    "host", "port", "name", "max_requests", "max_body_bytes", "stall_seconds", "drain_seconds", "api_keys",
    "admin_port", "admin_host", "admin_keys", "cors_origin", "share_weights", "log_format", "log_prompts",
    "otlp_endpoint"))


class ServerOptions(Options):
    """Options of an HTTP server: addresses, limits, API keys, logs."""

    host: Annotated[str, option(
        "address to listen on", "H")] = "127.0.0.1"
    port: Annotated[int, option(
        "port to listen on", "P", ge=1, le=65535)] = 8000
    name: Annotated[str, option(
        "name of the model for clients (default: MODEL)", "NAME", "--served-model-name")] | None = None
    max_requests: MaxRequests = 1024
    max_body_bytes: Annotated[int, option(
        "bytes of a request's body; more are answered with 413", "N", ge=1)] = 4 << 20
    stall_seconds: Annotated[float, option(
        "seconds without a step of a busy engine, after which /health fails", "S", gt=0)] = 60.0
    drain_seconds: Annotated[float, option(
        "seconds that open requests have to end after SIGTERM", "S", ge=0)] = 300.0
    api_keys: Annotated[str, option(
        "file of API keys, one per line (default: those in QWEN_JAX_API_KEYS)", "FILE")] | None = None
    cors_origin: Annotated[str, option(
        "origins of web pages that may read answers, with commas between them, or * for all (default: none)",
        "ORIGINS")] | None = None
    salt_by_key: Annotated[bool, option(
        "a prefix cache for each API key, so that its timing tells nothing about the prompts of other keys")] = False
    min_priority: Annotated[int, option(
        "lowest priority of requests without an admin key; waiting requests with the lowest one run first (default: "
        "any)", "N")] | None = None
    adapter_dir: Annotated[str, option(
        "folder with LoRA adapters, the only one that they are loaded from (default: none)", "FOLDER")] | None = None
    public_adapters: Annotated[bool, option(
        "LoRA adapters may be loaded and unloaded without an admin key")] = False
    admin_port: Annotated[int, option(
        "port for updates of the weights and for trials (default: none)", "P", ge=1, le=65535)] | None = None
    admin_host: Annotated[str, option(
        "address of the admin port", "H")] = "127.0.0.1"
    admin_keys: Annotated[str, option(
        "file of keys for the admin port and for adapters (default: those in QWEN_JAX_ADMIN_KEYS)",
        "FILE")] | None = None
    share_weights: Annotated[bool, option(
        "shared memory for converted checkpoints, decoded once for all servers of a machine")] = False
    log_format: Annotated[Literal["text", "json"], option(
        "form of log lines")] = "text"
    log_prompts: Annotated[bool, option(
        "log lines with every request's prompt")] = False
    otlp_endpoint: Annotated[str, option(
        "URL for OpenTelemetry traces, such as http://localhost:4318/v1/traces", "URL")] | None = None

    def deciding(self) -> dict[str, Any]:
        """Return the options that may decide what a response says: all but those in `WITHOUT_INFLUENCE`."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if name not in WITHOUT_INFLUENCE}


class CacheOptions(Options):
    """Options of the cache of whole HTTP responses: size, lifetime, Redis server."""

    megabytes: Annotated[float, option(
        "megabytes of answers, each kept for exactly the same deterministic request; 0 for none", "N",
        "--response-cache-mb", ge=0)] = 64.0
    seconds: Annotated[float, option(
        "seconds for which answers are kept", "S", "--response-cache-seconds", gt=0)] = 3600.0
    redis_url: Annotated[str, option(
        "URL of a Redis server, the cache's second level for several servers", "URL")] | None = None
