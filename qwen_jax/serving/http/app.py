"""The web application of the public port, put together from routes, metrics and middleware."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import APIRouter, FastAPI
from prometheus_client.registry import Collector
from starlette.middleware.cors import CORSMiddleware

from qwen_jax.serving.http.anthropic.routes import messages_routes
from qwen_jax.serving.http.app_factory import Middleware, new_app
from qwen_jax.serving.http.generation_routes import generation_routes
from qwen_jax.serving.http.http_metrics import HttpMetrics
from qwen_jax.serving.http.limits import Keys
from qwen_jax.serving.http.model_routes import model_routes
from qwen_jax.serving.http.monitoring_routes import monitoring_routes
from qwen_jax.serving.http.request_log import Observer
from qwen_jax.serving.http.responses.routes import responses_routes
from qwen_jax.serving.http.scoring_routes import scoring_routes
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.http.tokenizer_routes import tokenizer_routes


@dataclass(frozen=True)
class Extension:
    """Middleware, metrics and routes that another package adds to a server, such as a response cache.

    Attributes:
      inner: middleware that runs after the checks of size and API key and before the routes.
      collectors: metrics to add to ``/metrics``.
      admin: routes to add to the admin port.
      public: routes to add to the public port.
    """

    inner: Middleware | None = None
    collectors: Sequence[Collector] = ()
    admin: Sequence[APIRouter] = ()
    public: Sequence[APIRouter] = ()


def create_app(service: Service, observers: Sequence[Observer], keys: Keys, max_body_bytes: int,
               extension: Extension) -> FastAPI:
    """Return the FastAPI application of the public port.

    Args:
      observers: called with the record of every request that has ended, such as `log_access`.
    """
    metrics = HttpMetrics(extension.collectors)
    app = new_app("qwen-jax", (metrics.answered, *observers), keys, max_body_bytes, extension.inner)
    if origins := service.options.cors_origin:
        # Around all else: a browser asks first, without a key, and reads errors only with these headers.
        app.add_middleware(CORSMiddleware, allow_origins=[origin.strip() for origin in origins.split(",")],
                           allow_methods=["*"], allow_headers=["*"], expose_headers=["*"])
    for router in (monitoring_routes(service, metrics), scoring_routes(service), model_routes(service),
                   generation_routes(service), messages_routes(service), responses_routes(service),
                   tokenizer_routes(service), *extension.public):
        app.include_router(router)
    return app
