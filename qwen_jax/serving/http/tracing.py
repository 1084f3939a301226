"""OpenTelemetry tracing: a span for each HTTP request."""

from __future__ import annotations

from qwen_jax.errors import UserError
from qwen_jax.serving.http.request_log import Exchange, Observer

NANO = 1_000_000_000
# Attributes in OpenTelemetry's semantic conventions for generative AI, by the names of a request's details.
_NAMES = {"model": "gen_ai.request.model", "prompt_tokens": "gen_ai.usage.input_tokens",
          "completion_tokens": "gen_ai.usage.output_tokens", "finish_reasons": "gen_ai.response.finish_reasons"}
_EVENTS = {"queue_seconds": "started", "first_token_seconds": "first_token", "engine_seconds": "ended"}


def tracer(endpoint: str) -> Observer:
    """Return an observer that sends an OpenTelemetry span for each request, ``GET`` excepted, to a collector.

    Args:
      endpoint: URL of OTLP over HTTP, such as ``http://localhost:4318/v1/traces``.
    Raises:
      UserError: OpenTelemetry's packages are not installed.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ModuleNotFoundError as error:
        raise UserError(f"traces need the package {error.name}: pip install 'qwen-jax[otel]'") from error

    provider = TracerProvider(resource=Resource.create({"service.name": "qwen-jax"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    source, propagator = provider.get_tracer("qwen_jax.serving"), TraceContextTextMapPropagator()

    def observe(exchange: Exchange) -> None:
        if exchange.method == "GET":  # probes and scrapes
            return
        parent = propagator.extract({"traceparent": exchange.traceparent}) if exchange.traceparent else None
        start = int(exchange.at * NANO)
        attributes = {"http.request.method": exchange.method, "http.route": exchange.route,
                      "http.response.status_code": exchange.status, "qwen_jax.request_id": exchange.id}
        attributes |= {name: exchange.details[key] for key, name in _NAMES.items() if key in exchange.details}
        span = source.start_span(f"{exchange.method} {exchange.route}", parent, trace.SpanKind.SERVER, attributes,
                                 start_time=start)
        for key, name in _EVENTS.items():
            if key in exchange.details:
                span.add_event(name, timestamp=start + int(exchange.details[key] * NANO))
        if exchange.status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        span.end(start + int(exchange.seconds * NANO))

    return observe
