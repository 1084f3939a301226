"""Predict which hardware reaches the latency, rate and memory that a fraud service published, by a roofline.

    python scripts/bench/published_figures.py

The published figures are 180 ms, 1,250 requests per second and 89 GB. Nothing is run: the planner predicts the times of
steps. A request has a prompt of ``prompt`` tokens that are not in a prefix cache, and ``answer`` tokens of answer.
While ``rows`` requests decode together, each decode step is followed by the prefill of the rows / answer requests that
replace finished requests; the rate is the largest rate at which a request still takes at most 180 ms. A response cache
that answers 65 % of the requests leaves 35 % to the engines.
"""

from __future__ import annotations

from qwen_jax.config import ModelConfig
from qwen_jax.parallel.hardware import hardware
from qwen_jax.parallel.plan import make_plan
from qwen_jax.parallel.planner import STEP_TOKENS, PlanRequest, predict
from qwen_jax.parallel.roofline import CostModel
from qwen_jax.quantization import default_precision

SECONDS, RATE, GIGABYTES, REPEATED = 0.180, 1250, 89, 0.65
KINDS = (("first token alone", 200, 1), ("first token, the rest cached", 60, 1), ("short reason", 200, 20),
         ("chat", 1000, 200))
CASES = (("qwen2.5-72b", "h100", 1, 8), ("qwen2.5-72b", "h200", 1, 8), ("qwen2.5-7b", "h100", 8, 1),
         ("qwen2.5-7b", "h200", 8, 1))


def best(work: CostModel, prompt: int, answer: int) -> tuple[float, float, int]:
    """Choose the batch size with the highest predicted request rate whose latency stays within `SECONDS`.

    Returns (requests per second, latency in seconds, batch size); those of the lowest latency if none is within it.
    """
    options = []
    for rows in (*range(1, 32), *range(32, 513, 8)):
        if answer == 1:
            if rows * prompt > STEP_TOKENS:
                break
            step = work.seconds(rows, prompt, prompt / 2)
            options.append((rows / step, 2 * step, rows))  # a request waits for the running step, then for its own
            continue
        together = max(1, min(rows, STEP_TOKENS // prompt))
        prefill = work.seconds(together, prompt, prompt / 2) / together
        step = work.seconds(rows, 1, prompt + answer / 2) + rows / answer * prefill
        options.append((rows / (answer * step), work.seconds(1, prompt, prompt / 2) + answer * step, rows))
    within = [option for option in options if option[1] <= SECONDS]
    return max(within) if within else min(options, key=lambda option: option[1])


def main() -> None:
    print("| model and devices | values | weights, GB in all | + KV of 32 x 4,096 tokens, GB | what is answered | "
          f"requests/s within {SECONDS * 1000:.0f} ms | latency, ms | with {REPEATED:.0%} from the cache |")
    print("|---|---|---|---|---|---|---|---|")
    for name, device, data, tensor in CASES:
        config = ModelConfig.preset(name)
        for fp8 in (False, True):
            precision = default_precision(config, fp8, "e4m3" if fp8 else None, tables=fp8)
            plan = make_plan(config, data, 1, tensor)
            work = CostModel(config, plan, hardware(device), precision)
            request = PlanRequest(config, hardware(device), data * tensor, batch=32, precision=precision)
            memory = predict(request, plan).memory
            weights, cache = (data * tensor * memory[item] / 1e9 for item in ("weights", "kv_cache"))
            for kind, prompt, answer in KINDS:
                rate, seconds, _ = best(work, prompt, answer)
                rate *= data
                reached = seconds <= SECONDS
                print(f"| {name.removeprefix('qwen2.5-').upper()}, {f'{data} x ' if data > 1 else ''}"
                      f"{f'{tensor} ' if tensor > 1 else ''}{device.upper()} | {'FP8' if fp8 else 'BF16'} | "
                      f"{weights:.0f} | {weights + cache:.0f} | {kind} ({prompt} + {answer}) | "
                      f"{f'{rate:,.0f}' if reached else 'never'} | {seconds * 1000:,.0f} | "
                      f"{f'{rate / (1 - REPEATED):,.0f}' if reached else ''} |")


if __name__ == "__main__":
    main()
