"""Compare the engine's tokens per second with other engines' on a mixed trace of requests that is submitted at once.

    python scripts/bench/throughput.py [--requests 200] [--rounds 3] [--contenders ours,continuous,static]
    python scripts/bench/throughput.py --contenders ours,continuous,static,tunix --tunix-python ENV/bin/python

0.5B shape, random weights. Prompts of 16-1024 tokens (log-uniform), answers of 1-128 (uniform), greedy, exact lengths.

- ours: `Engine` with default settings, bf16.
- continuous: transformers' continuous batching, scaled-dot-product attention (of the implementations that it accepts,
  only this and "paged|eager" run on a CPU). Its attention spans all requests of a batch under a mask, so more requests
  at once are not always better. Settings are REQUESTS:TOKENS, the maximum of each in a batch.
- static: transformers' `generate` on left-padded batches, sorted by prompt length.
- tunix: Tunix's sampler on the same kind of batches (`tunix_runner.py` says what its environment needs), with at most
  TUNIX_PROMPT_TOKENS padded tokens, because it computes logits at every position of a prompt.

Peers with several settings first try each setting on 32 neighbours of the sorted trace and keep the best. Compiling
and warm-up are outside the clock. Every round has its own token ids, so no prefix cache helps. Without AVX-512 torch
and XLA have no fast bf16 product: run a peer with both values of --peer-dtype and take the better result.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import torch  # noqa: E402
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen2Config, Qwen2ForCausalLM  # noqa: E402
from workload import Peer, Request, say, shape, trace  # noqa: E402

from qwen_jax import Engine  # noqa: E402

PROMPT, OUTPUT = (16, 1024), (1, 128)
PAGE = 256  # tokens of a page of transformers' cache
TUNIX_PROMPT_TOKENS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", default="ours,continuous,static")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script out")
    parser.add_argument("--peer-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--continuous", default="8:256,16:512,32:512", help="settings to try, REQUESTS:TOKENS")
    parser.add_argument("--static", default="8,16,32", help="batch sizes to try")
    parser.add_argument("--tunix", default="8,16", help="batch sizes to try")
    parser.add_argument("--tunix-python", help="the Python of an environment with google-tunix")
    args = parser.parse_args()
    names = args.contenders.split(",")
    if "tunix" in names and not args.tunix_python:
        parser.error("tunix needs --tunix-python")
    torch.manual_seed(args.seed)
    torch.set_num_threads(os.cpu_count())
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    config = shape(args.preset, args.layers)
    hf = Qwen2ForCausalLM(Qwen2Config.from_dict(config.to_hf())).to(torch.bfloat16).eval()
    hf.generation_config.eos_token_id = None
    make = {"ours": lambda: Ours(hf), "continuous": lambda: Continuous(hf, args.continuous),
            "static": lambda: Static(hf, args.static),
            "tunix": lambda: Tunix(args.tunix_python, config.num_layers, args.peer_dtype, args.tunix)}
    contenders = {name: make[name]() for name in names}
    hf.to(getattr(torch, args.peer_dtype))  # after ours has its weights

    sample = sorted(trace(args.requests, args.seed, args.rounds, PROMPT, OUTPUT), key=lambda r: len(r.prompt))
    sample = sample[max(0, len(sample) // 2 - 16):][:32]
    for name, contender in contenders.items():
        contender.run(sample[:1])  # warm-up
        if len(contender.settings) > 1:
            tried = {}
            for setting in contender.settings:
                contender.setting = setting
                tried[setting] = contender.run(sample)
                say(f"{name} {setting}: {tried[setting]:.1f} s for {len(sample)} requests")
            contender.setting = min(tried, key=tried.get)

    times = {name: [] for name in contenders}
    for round_ in range(args.rounds):
        requests = trace(args.requests, args.seed, round_, PROMPT, OUTPUT)
        order = list(contenders)
        for name in order if round_ % 2 == 0 else reversed(order):
            times[name].append(contenders[name].run(requests))
            say(f"round {round_} {name}: {times[name][-1]:.1f} s")
    report(requests, times, contenders, args)


def report(requests, times, contenders, args) -> None:
    """Print tokens per second of each contender, and our rate over that of the best peer."""
    prompt, output = sum(len(r.prompt) for r in requests), sum(r.tokens for r in requests)
    print(f"{len(requests)} requests, {prompt:,} prompt and {output:,} generated tokens; "
          f"medians of {args.rounds} alternating rounds, peers in {args.peer_dtype}")
    print(f"{'tokens/s':24} {'generated':>10} {'total':>10} {'seconds':>9}")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        label = f"{name} {contenders[name].setting or ''}"
        print(f"{label:24} {output / median:10.1f} {(prompt + output) / median:10.1f} {median:9.1f}")
    others = {name: median for name, median in medians.items() if name != "ours"}
    if "ours" in medians and others:
        best = min(others, key=others.get)
        print(f"ours / best other ({best}): {others[best] / medians['ours']:.2f}")


class Contender:
    """An engine to compare: ``run`` answers requests and returns the seconds that they took, preparation left out."""

    def __init__(self, hf: Qwen2ForCausalLM | None, settings: str) -> None:
        self.hf, self.settings = hf, settings.split(",")
        self.setting = self.settings[0]


class Ours(Contender):
    def __init__(self, hf) -> None:
        super().__init__(None, "")
        self.engine = Engine(model=hf, warmup="full", dtype="bfloat16", max_seq_len=PROMPT[1] + OUTPUT[1])

    def run(self, requests):
        began = time.perf_counter()
        outputs = self.engine.generate([r.prompt for r in requests], [r.params for r in requests])
        took = time.perf_counter() - began
        check([len(out.token_ids) for out in outputs], requests)
        return took


class Continuous(Contender):
    def run(self, requests):
        rows, tokens = map(int, self.setting.split(":"))
        pages = -(-(PROMPT[1] + OUTPUT[1]) // PAGE) + 1  # of one request; the scheduler keeps a share of them free
        batching = ContinuousBatchingConfig(page_size=PAGE, num_blocks=rows * pages, max_batch_tokens=tokens,
                                            max_requests_per_batch=rows)
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        with self.hf.continuous_batching_context_manager(greedy, continuous_batching_config=batching) as manager:
            began = time.perf_counter()
            names = [manager.add_request(r.prompt, max_new_tokens=r.tokens) for r in requests]
            answers = {}
            while len(answers) < len(names):
                answer = manager.get_result(timeout=1)
                if answer is not None and answer.is_finished():
                    answers[answer.request_id] = answer
                elif answer is None and not manager.is_running():
                    raise SystemExit("transformers' continuous batching stopped: see its log")
            took = time.perf_counter() - began
        check([len(answers[name].generated_tokens) for name in names], requests)
        return took


class Static(Contender):
    @torch.no_grad()
    def run(self, requests):
        began = time.perf_counter()
        for batch in batches(requests, int(self.setting)):
            width, steps = len(batch[-1].prompt), max(r.tokens for r in batch)
            tokens = torch.tensor([[0] * (width - len(r.prompt)) + r.prompt for r in batch])
            out = self.hf.generate(tokens, attention_mask=(tokens > 0).long(), max_new_tokens=steps,
                                   min_new_tokens=steps, do_sample=False, pad_token_id=0)
            if out.shape[1] != width + steps:
                raise SystemExit(f"generate gave {out.shape[1] - width} tokens where {steps} were asked for")
        return time.perf_counter() - began


class Tunix(Contender):
    def __init__(self, python: str, layers: int, dtype: str, settings: str) -> None:
        super().__init__(None, settings)
        self.peer = Peer(python, "tunix_runner.py")
        self.peer.ask(layers=layers, dtype=dtype)

    def run(self, requests):
        work = [{"prompts": [r.prompt for r in batch], "steps": OUTPUT[1]}  # other steps would compile again
                for batch in batches(requests, int(self.setting), TUNIX_PROMPT_TOKENS)]
        return self.peer.ask(batches=work)["seconds"]


def batches(requests: list[Request], rows: int, prompt_tokens: int | None = None) -> list[list[Request]]:
    """Sort the requests by prompt length and split them into batches of at most ``rows`` requests.

    prompt_tokens: most prompt tokens in a batch, with its prompts padded to a power of two.
    """
    result = [[]]
    for request in sorted(requests, key=lambda r: len(r.prompt)):
        padded = 1 << (len(request.prompt) - 1).bit_length()
        if len(result[-1]) >= min(rows, prompt_tokens // padded if prompt_tokens else rows):
            result.append([])
        result[-1].append(request)
    return result


def check(lengths: list[int], requests: list[Request]) -> None:
    """Exit with a message if an answer does not have the number of tokens that its request asks for."""
    wrong = [(length, r.tokens) for length, r in zip(lengths, requests) if length != r.tokens]
    if wrong:
        raise SystemExit(f"{len(wrong)} answers have the wrong length (got, asked for): {wrong[:3]}")


if __name__ == "__main__":
    main()
