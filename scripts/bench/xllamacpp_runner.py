"""Run llama.cpp on a GGUF file behind a pipe: a JSON object per line in, a JSON object per line out.

`integer_weights.py` starts this script, in an environment with xllamacpp.

    {"gguf": "model.gguf", "context": 2048, "parallel": 8}  ->  {"ready": true}   (the first line)
    {"prompts": [[1, 2, 3]], "tokens": 16}                  ->  {"seconds": 1.5}
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import xllamacpp


def main() -> None:
    answer_to, sys.stdout = sys.stdout, sys.stderr
    setup = json.loads(sys.stdin.readline())
    params = xllamacpp.CommonParams()
    params.model.path = setup["gguf"]
    params.n_ctx = setup["context"] * setup["parallel"]
    params.n_parallel = setup["parallel"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(json.dumps({"ready": True}), file=answer_to, flush=True)
    for line in sys.stdin:
        request = json.loads(line)

        def ask(prompt: list[int], tokens: int = request["tokens"]) -> None:
            answer = server.handle_completions({"prompt": prompt, "n_predict": tokens, "max_tokens": tokens,
                                                "temperature": 0, "ignore_eos": True, "cache_prompt": False})
            used = answer["usage"]["completion_tokens"]
            assert used == tokens, f"{used} tokens instead of {tokens}"

        began = time.perf_counter()
        with ThreadPoolExecutor(len(request["prompts"])) as threads:
            list(threads.map(ask, request["prompts"]))
        print(json.dumps({"seconds": time.perf_counter() - began}), file=answer_to, flush=True)


if __name__ == "__main__":
    main()
