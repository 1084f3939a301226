"""Metrics, logs and traces of live processes."""
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from live import ROOT
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

ASK = {"model": "bundled", "prompt": "hello", "max_tokens": 7, "temperature": 0, "ignore_eos": True}
DASHBOARD = ROOT / "configs" / "dashboards" / "qwen_jax.json"


def metrics(server) -> dict[tuple, float]:
    """By name and labels."""
    answer = server.http.get("/metrics")
    assert answer.status_code == 200
    return {(sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(answer.text) for sample in family.samples}


def test_metrics_count_what_happened(server):
    before = metrics(server)
    usage = server.post("/v1/completions", {**ASK, "n": 3, "temperature": 1}).json()["usage"]
    with server.http.stream("POST", "/v1/completions", json={**ASK, "stream": True}) as answer:
        answer.read()
    server.post("/v1/completions", {**ASK, "temperature": -1})
    server.wait_until_free()
    after = metrics(server)

    def more(name, **labels):
        key = (f"qwen_jax_{name}", *sorted(labels.items()))
        return after[key] - before.get(key, 0)

    assert more("generation_tokens_total") == 28 and more("prompt_tokens_total") == 4 * usage["prompt_tokens"]
    assert more("request_success_total", finished_reason="length") == 4
    assert more("requests_by_schedule_total", schedule="full_attention") == 4
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert more(f"{name}_seconds_count") == 4
    assert more("request_generation_tokens_sum") == 28 and more("request_prompt_tokens_count") == 4
    assert 0 < more("time_to_first_token_seconds_sum") < more("e2e_request_latency_seconds_sum")
    assert 4 <= more("inter_token_latency_seconds_count") <= 24
    assert more("http_requests_total", route="/v1/completions", status="200") == 2
    assert more("http_requests_total", route="/v1/completions", status="400") == 1
    assert min(more(f"{name}_total") for name in ("model_flops", "model_bytes_read", "device_busy_seconds")) > 0
    for name, value in (("num_requests_running", 0), ("num_requests_waiting", 0), ("kv_cache_usage_perc", 0),
                        ("kv_cache_unused_slots_ratio", 0), ("compiles_after_warmup", 0), ("weight_version", 0),
                        ("http_requests_open", 0), ("engine_up", 1), ("kv_cache_pages_total", 15)):
        assert after[f"qwen_jax_{name}",] == value, name


def test_pages_and_fragmentation_while_a_request_runs(server):
    with server.http.stream("POST", "/v1/completions", json={**ASK, "max_tokens": 900, "stream": True}) as answer:
        lines = answer.iter_lines()  # the answer is closed when these are
        next(lines)
        now = metrics(server)
        assert now["qwen_jax_kv_cache_usage_perc",] > 0 and now["qwen_jax_num_requests_running",] == 1
        assert 0 < now["qwen_jax_kv_cache_unused_slots_ratio",] < 1
    server.wait_until_free()


def test_the_dashboard_shows_metrics_that_exist(server):
    dashboard = json.loads(DASHBOARD.read_text())
    asked = {name for panel in dashboard["panels"] for target in panel.get("targets", ())
             for name in re.findall(r"qwen_jax_\w+", target["expr"])}
    server.post("/v1/completions", ASK)
    there = {name for name, *_ in metrics(server)}
    assert not any(name.endswith("_created") for name in there)  # of no use, and as many again
    only_on_gpus = {"qwen_jax_device_utilization_ratio", "qwen_jax_device_memory_used_bytes",
                    "qwen_jax_device_memory_limit_bytes", "qwen_jax_device_largest_free_block_bytes"}
    not_yet = {"qwen_jax_fp8_fallbacks_total"}  # a sample for each layer that had one
    assert len(asked) > 20 and asked - there <= only_on_gpus | not_yet
    source = (ROOT / "qwen_jax" / "serving" / "engine_process" / "engine_metrics.py").read_text()
    for name in (only_on_gpus | not_yet) & asked:
        words = name.removeprefix("qwen_jax_").removeprefix("device_").removesuffix("_total")
        assert f'"{words}"' in source, name


@pytest.fixture
def collector():
    """Of traces: every body that was posted."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
    server.shutdown()


def printed_when(server, text: str) -> str:
    """What it has printed as soon as this is part of it: a line may come after the answer."""
    end = time.monotonic() + 10
    while text not in (printed := server.printed()):
        assert time.monotonic() < end, printed
        time.sleep(0.05)
    return printed


def test_logs_and_traces(own, collector):
    endpoint, bodies = collector
    server = own("--log-format", "json", "--otlp-endpoint", endpoint)
    trace, secret = "0af7651916cd43dd8448eb211c80319c", "nobody should read this"
    answer = server.post("/v1/completions", {**ASK, "prompt": secret}, headers={
        "x-request-id": "mine-1", "traceparent": f"00-{trace}-b7ad6b7169203331-01"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert server.post("/v1/completions", {**ASK, "prompt": ""}, headers={"x-request-id": "not\tgood"}
                       ).headers["x-request-id"].startswith("req_")
    printed = printed_when(server, '"status": 400')
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    mine, = (line for line in lines if line.get("request_id") == "mine-1")
    assert mine["status"] == 200 and mine["completion_tokens"] == 7 and mine["finish_reasons"] == ["length"]
    assert 0 <= mine["queue_seconds"] <= mine["first_token_seconds"] <= mine["engine_seconds"] <= mine["seconds"] + .01
    assert secret not in printed

    end = time.monotonic() + 20
    while not bodies:  # sent in the background
        assert time.monotonic() < end
        time.sleep(0.1)
    spans = [span for body in bodies for resource in ExportTraceServiceRequest.FromString(body).resource_spans
             for scope in resource.scope_spans for span in scope.spans]
    span, = (span for span in spans if span.trace_id.hex() == trace)
    attributes = {one.key: one.value for one in span.attributes}
    assert span.parent_span_id.hex() == "b7ad6b7169203331" and span.name == "POST /v1/completions"
    assert attributes["gen_ai.usage.output_tokens"].int_value == 7
    assert attributes["qwen_jax.request_id"].string_value == "mine-1"
    assert [event.name for event in span.events] == ["started", "first_token", "ended"]
    assert span.start_time_unix_nano <= span.events[0].time_unix_nano <= span.end_time_unix_nano


def test_prompts_are_logged_when_asked(own):
    server = own("--log-format", "json", "--log-prompts")
    server.post("/v1/completions", {**ASK, "prompt": "this is fine to read"})
    printed_when(server, "this is fine to read")


def test_nvml_is_read_where_there_is_one(monkeypatch):
    import sys
    from types import SimpleNamespace

    from qwen_jax.serving.engine_process.engine_metrics import _utilization

    library = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda index: index,
                              nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=40 + handle))
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert _utilization(SimpleNamespace(local_hardware_id=2)) == pytest.approx(0.42)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert _utilization(SimpleNamespace(local_hardware_id=2)) is None
