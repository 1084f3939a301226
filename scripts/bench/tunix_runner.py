"""Time Tunix's sampler behind a pipe: a JSON object per line in, a JSON object per line out.

`throughput.py` starts this script. It needs an environment with google-tunix 0.1.7 and our versions of jax and flax:

    python3.11 -m venv ENV && ENV/bin/pip install jax==0.10.2 flax==0.12.8 google-tunix==0.1.7

    {"layers": 24, "dtype": "bfloat16"}  ->  {"ready": true}   (the first line)
    {"batches": [{"prompts": [[1, 2], [3]], "steps": 128}]}  ->  {"seconds": 1.5, "answers": [[128, 128]]}

Batches are left-padded to a power of two, as the sampler does by itself; each padded length has its own cache size. All
shapes are compiled before the clock starts. ``answers`` are lengths.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

with contextlib.redirect_stdout(sys.stderr):
    import jax.numpy as jnp
    from flax import nnx
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.generate.utils import next_power_of_2
    from tunix.models.qwen2.model import ModelConfig, Qwen2

PAD = 151_935  # past every token id of a trace


class Ids:
    """A stand-in tokenizer for Tunix's sampler, whose texts are lists of token ids already."""

    def encode(self, ids, **_):
        return list(ids)

    def decode(self, ids, **_):
        return ""

    def bos_id(self):
        return None

    def eos_id(self):
        return -1  # no token: answers have full length

    def pad_id(self):
        return PAD


class WarmSampler(Sampler):
    """A Tunix sampler that, while ``warming``, only compiles: it ends each answer before its first decode step."""

    warming = False

    def init_sample_state(self, *args, **kwargs):
        state = super().init_sample_state(*args, **kwargs)
        return dataclasses.replace(state, done=jnp.ones_like(state.done)) if self.warming else state


def main() -> None:
    answer_to, sys.stdout = sys.stdout, sys.stderr
    setup = json.loads(sys.stdin.readline())
    config = dataclasses.replace(ModelConfig.qwen2p5_0p5b(), num_layers=setup["layers"],
                                 dtype=jnp.dtype(setup["dtype"]), param_dtype=jnp.dtype(setup["dtype"]))
    model = Qwen2(config, rngs=nnx.Rngs(0))
    print(json.dumps({"ready": True}), file=answer_to, flush=True)
    samplers, warm = {}, set()

    def run(batch, warming=False):
        width = next_power_of_2(max(map(len, batch["prompts"])))
        size = width + batch["steps"]
        shape = len(batch["prompts"]), width, size
        if warming and shape in warm:
            return []
        warm.add(shape)
        if size not in samplers:
            samplers[size] = WarmSampler(
                model, Ids(), CacheConfig(size, config.num_layers, config.num_kv_heads, config.head_dim))
        samplers[size].warming = warming
        out = samplers[size](batch["prompts"], max_generation_steps=batch["steps"], max_prompt_length=width)
        return [len(tokens) for tokens in out.tokens]

    for line in sys.stdin:
        batches = json.loads(line)["batches"]
        for batch in batches:
            run(batch, warming=True)
        began = time.perf_counter()
        answers = [run(batch) for batch in batches]
        print(json.dumps({"seconds": time.perf_counter() - began, "answers": answers}), file=answer_to, flush=True)


if __name__ == "__main__":
    main()
