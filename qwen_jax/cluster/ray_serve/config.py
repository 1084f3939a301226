"""The configuration file of ``qwen-jax cluster up``: model, number of engines, options of engines and gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml
from msgspec import Meta

from qwen_jax.errors import UserError
from qwen_jax.serving.options import CacheOptions, EngineOptions, MaxRequests, Options, ServerOptions
from qwen_jax.structs import convert

Count = Annotated[int, Meta(ge=1)]


class Autoscaling(Options):
    """Settings of autoscaling: the bounds of the number of engines, and how it follows the open requests.

    Attributes:
      min, max: smallest and largest number of engines.
      target: number of open requests per engine that is aimed at.
      up_seconds: time for which more engines must be needed before they are added.
      down_seconds: time for which fewer engines must be needed before others end.
    """

    min: Count
    max: Count
    target: Annotated[float, Meta(gt=0)] = 32.0
    up_seconds: Annotated[float, Meta(ge=0)] = 10.0
    down_seconds: Annotated[float, Meta(ge=0)] = 300.0

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise ValueError(f"min must be at most max, which is {self.max}, not {self.min}")


class GatewayOptions(ServerOptions):
    """Options of the gateway, the cluster's one HTTP server: those of a single server.

    ``host`` and ``port`` are those of Ray Serve's proxies on every node.

    Files of keys and the admin port are on the gateway's node. The default of ``max_requests`` is larger than that of
    a single server, since the requests are those of several engines.
    """

    max_requests: MaxRequests = 4096


class ClusterConfig(Options):
    """Configuration of a cluster: the model, its engines, and the gateway in front of them.

    Attributes:
      model: a folder that all nodes have, a hub id or ``bundled``.
      replicas: number of engines, each on devices of its own; or the bounds between which it follows the load.
      hosts: number of processes that an engine runs on, each with its share of the devices.
      resources: Ray's resources of each such process, such as {"CPU": 4, "GPU": 8}.
      environment: variables of the engines' processes, beside those that Ray sets.
      surge: whether an engine's successor starts before that engine ends, which needs free devices; otherwise it starts
        afterwards.
      engine: options of every engine.
      server: options of the gateway.
      cache: options of the response cache, which is in the gateway's process.
      fraud: whether there are routes that screen card payments.
    """

    model: Annotated[str, Meta(min_length=1)]
    replicas: Count | Autoscaling = 1
    hosts: Count = 1
    resources: dict[str, Annotated[float, Meta(ge=0)]] = msgspec.field(default_factory=lambda: {"CPU": 1.0})
    environment: dict[str, str] = {}
    surge: bool = True
    engine: EngineOptions = EngineOptions()
    server: GatewayOptions = GatewayOptions()
    cache: CacheOptions = CacheOptions()
    fraud: bool = False

    def allowed(self, count: int) -> int:
        """Return the allowed number of engines that is nearest to ``count``."""
        replicas = self.replicas
        return replicas if isinstance(replicas, int) else min(max(count, replicas.min), replicas.max)

    def needs_restart(self, other: ClusterConfig) -> list[str]:
        """Return the names of the sections that differ from ``other`` and cannot change while the gateway runs."""
        return [name for name in ("server", "cache", "fraud") if getattr(self, name) != getattr(other, name)]

    def same_engines(self, other: ClusterConfig) -> bool:
        """Return whether ``other`` makes its engines in the same way, so that running engines need not be replaced."""
        names = ("model", "engine", "hosts", "resources", "environment")
        return all(getattr(self, name) == getattr(other, name) for name in names)


def read_config(path: str) -> ClusterConfig:
    """Read a cluster's configuration from a YAML file; UserError when it cannot be read or is invalid."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"the cluster's file cannot be read: {error.strerror}: {path}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} must be YAML: {error}") from error
    return parse_config(values, path)


def parse_config(values: Any, where: str) -> ClusterConfig:
    """Return the cluster configuration that plain values, as read from YAML, describe; UserError if they are invalid.

    Args:
      where: name of their origin, with which the message of a UserError begins.
    """
    try:
        return convert(values, ClusterConfig, "the file")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def serve_config(config: ClusterConfig) -> dict[str, Any]:
    """Return a cluster's configuration in the form that ``serve deploy`` and a RayService's ``serveConfigV2`` take."""
    return {"proxy_location": "EveryNode",
            "http_options": {"host": config.server.host, "port": config.server.port},
            "applications": [{"name": "qwen-jax", "route_prefix": "/",
                              "import_path": "qwen_jax.cluster.ray_serve.gateway:application",
                              "deployments": [{"name": "Gateway", "user_config": _changed(config)}]}]}


def _changed(options: Options) -> dict[str, Any]:
    """Return the options that differ from their defaults, as plain values."""
    values = {}
    for field in msgspec.structs.fields(options):
        value = getattr(options, field.name)
        has_factory = field.default_factory is not msgspec.NODEFAULT
        if value != (field.default_factory() if has_factory else field.default):
            values[field.name] = _changed(value) if isinstance(value, Options) else value
    return values
