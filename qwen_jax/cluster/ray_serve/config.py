"""What a cluster is to be: the file that ``qwen-jax cluster up`` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qwen_jax.errors import UserError

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Port = Annotated[int, Field(ge=1, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class EngineOptions(_Section):
    """Of ``Engine.from_pretrained``, for every engine; see there."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_batch_size: Count = 64
    max_seq_len: Count | None = None
    tp_size: Count = 1
    fp8_enabled: bool = False
    max_adapters: Annotated[int, Field(ge=0)] = 0
    max_adapter_rank: Count = 16
    kv_cache_bytes: Count | None = None
    batch_invariant: bool = False


class Autoscaling(_Section):
    """
    Attributes:
      min, max: how many engines there may be.
      target: open requests per engine that are wanted.
      up_seconds, down_seconds: for which more, or fewer, have to be wanted before there are.
    """

    min: Count
    max: Count
    target: Annotated[float, Field(gt=0)] = 32.0
    up_seconds: Annotated[float, Field(ge=0)] = 10.0
    down_seconds: Annotated[float, Field(ge=0)] = 300.0

    @model_validator(mode="after")
    def _ordered(self) -> Autoscaling:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max {self.max}")
        return self


class Server(_Section):
    """
    Attributes:
      host, port: of Ray Serve's proxies, of which every node has one.
      name: by which clients ask for the model; default: ``model``.
      max_requests: open at once; more are answered with 429.
      stall_seconds: without a step, with work, after which an engine is ended. drain_seconds: for requests of an engine
        that is to end.
      api_keys, admin_keys: files of the node that the gateway runs on, one key per line; default: its environment's
        QWEN_JAX_API_KEYS and QWEN_JAX_ADMIN_KEYS.
      admin_port, admin_host: of the gateway's node, for other weights and trials; none by default.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    name: str | None = None
    max_requests: Count = 4096
    max_body_bytes: Count = 4 << 20
    stall_seconds: Seconds = 60.0
    drain_seconds: Seconds = 300.0
    api_keys: str | None = None
    admin_port: Port | None = None
    admin_host: str = "127.0.0.1"
    admin_keys: str | None = None
    log_format: Literal["text", "json"] = "text"
    otlp_endpoint: str | None = None


class Cache(_Section):
    """Of responses: megabytes in the gateway's process (0 for none), how long, and a second level in Redis."""

    megabytes: Annotated[float, Field(ge=0)] = 64.0
    seconds: Seconds = 3600.0
    redis_url: str | None = None


class ClusterConfig(_Section):
    """
    Attributes:
      model: a folder that all nodes have, a hub id or ``bundled``.
      replicas: how many engines there are, each on devices of its own; or between which numbers.
      hosts: processes that one engine runs on, each with its part of the devices.
      resources: of Ray, for each such process, such as {"CPU": 4, "GPU": 8}.
      environment: of the engines' processes, beside what Ray gives them.
      surge: an engine that is replaced ends after its successor is there, for which devices have to be free; else
        before that.
      fraud: the routes that screen transactions.
    """

    model: Annotated[str, Field(min_length=1)]
    replicas: Count | Autoscaling = 1
    hosts: Count = 1
    resources: dict[str, Annotated[float, Field(ge=0)]] = {"CPU": 1.0}
    environment: dict[str, str] = {}
    surge: bool = True
    engine: EngineOptions = EngineOptions()
    server: Server = Server()
    cache: Cache = Cache()
    fraud: bool = False

    def allowed(self, count: int) -> int:
        """How many engines there may be, nearest to ``count``."""
        found = self.replicas
        return found if isinstance(found, int) else min(max(count, found.min), found.max)

    def needs_restart(self, other: ClusterConfig) -> list[str]:
        """Sections that cannot change while the gateway runs, of those that differ."""
        return [name for name in ("server", "cache", "fraud") if getattr(self, name) != getattr(other, name)]

    def same_engines(self, other: ClusterConfig) -> bool:
        names = ("model", "engine", "hosts", "resources", "environment")
        return all(getattr(self, name) == getattr(other, name) for name in names)


def read_config(path: str) -> ClusterConfig:
    """UserError for a file that cannot be read, is no YAML, or says what is not known."""
    try:
        found = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"the cluster's file cannot be read: {error.strerror}: {path}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {error}") from error
    return parse_config(found, path)


def parse_config(found: Any, where: str) -> ClusterConfig:
    try:
        return ClusterConfig.model_validate(found)
    except ValidationError as error:
        # Of replicas, which may be a number or a section, both are told: the one that was meant counts.
        first = next(one for one in error.errors() if one["type"] != "int_type" or not isinstance(one["input"], dict))
        named = [str(one) for one in first["loc"]]
        place = ".".join(one for one in named if one != "Autoscaling" and not one.startswith("constrained-int"))
        unknown = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        raise UserError(f"{where}: {place or 'the file'}: {unknown}") from error


def serve_config(config: ClusterConfig) -> dict[str, Any]:
    """As ``serve deploy`` and a RayService's ``serveConfigV2`` take it."""
    wanted = config.model_dump(mode="json", exclude_defaults=True)
    return {"proxy_location": "EveryNode",
            "http_options": {"host": config.server.host, "port": config.server.port},
            "applications": [{"name": "qwen-jax", "route_prefix": "/",
                              "import_path": "qwen_jax.cluster.ray_serve.gateway:application",
                              "deployments": [{"name": "Gateway", "user_config": wanted}]}]}
