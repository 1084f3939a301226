"""transformers as the oracle: small random Qwen2 models whose logits have a realistic scale."""

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_jax.checkpoint.hf_layout import layout, split


def random_qwen2(seed: int = 0, **options) -> Qwen2ForCausalLM:
    """A float32 model in eager attention; logits of order 1 to 10, key biases large as in released checkpoints.

    ``options`` override the configuration, with transformers' names.
    """
    settings = dict(vocab_size=320, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False,
                    rope_parameters={"rope_type": "default", "rope_theta": 1e6}, eos_token_id=None, bos_token_id=None)
    config = Qwen2Config(**settings | options, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = 1.0 if "embed" in name or "lm_head" in name else 1.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale * parameter.shape[1] ** -0.5)
            elif "bias" in name:
                scale = 5.0 if "k_proj" in name else 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            else:
                parameter.copy_(1 + torch.randn(parameter.shape, generator=generator) * 0.2)
        model.lm_head.weight.mul_(2.0)
    model.generation_config.eos_token_id = None
    return model.eval()


def hf_logits(model: Qwen2ForCausalLM, tokens, **inputs) -> torch.Tensor:
    """Float32 logits [B, T, V]."""
    with torch.no_grad():
        return model(torch.as_tensor(tokens), use_cache=False, **inputs).logits


def torch_model(config, params) -> Qwen2ForCausalLM:
    """The float32 transformers model, in eager attention, with our parameters (canonical path to array)."""
    settings = {name: value for name, value in config.to_hf().items() if name not in ("architectures", "model_type")}
    model = Qwen2ForCausalLM(Qwen2Config(**settings, attn_implementation="eager")).float()
    table = layout(config)
    state = {name: torch.tensor(np.array(tensor)) for path, array in params.items()
             for name, tensor in split(table[path], np.asarray(array))}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else []) and not unexpected
    return model
