"""Run llama.cpp on a GGUF file behind a pipe: a JSON object per line in, a JSON object per line out.

`gguf_agreement.py` starts this script.

    {"gguf": "model.gguf", "context": 1024}  ->  {"ready": true}   (the first line)
    {"text": "Hi", "tokens": [1, 2, 3], "stop": [7], "max_tokens": 16}  ->  {"tokenized": [1, 2], "continued": [4, 7]}
"""

import json
import os
import sys

from llama_cpp import Llama, llama_cpp


def main() -> None:
    answer_to, sys.stdout = sys.stdout, sys.stderr
    setup = json.loads(sys.stdin.readline())
    without_extra_buffers()
    model = Llama(setup["gguf"], n_ctx=setup["context"], n_threads=os.cpu_count(), verbose=False)
    print(json.dumps({"ready": True}), file=answer_to, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        tokenized = model.tokenize(request["text"].encode(), add_bos=False, special=True)
        continued = []
        for token in model.generate(request["tokens"], temp=0.0, repeat_penalty=1.0):
            continued.append(token)
            if token in request["stop"] or len(continued) == request["max_tokens"]:
                break
        print(json.dumps({"tokenized": tokenized, "continued": continued}), file=answer_to, flush=True)


def without_extra_buffers() -> None:
    """Keep llama.cpp from repacking the file's weights for its AMX kernels, which crash on some machines (0.3.36)."""
    defaults = llama_cpp.llama_model_default_params

    def changed():
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_model_default_params = changed


if __name__ == "__main__":
    main()
