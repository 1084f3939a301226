"""Tiny Hugging Face folders, written by transformers and by the safetensors library: neither uses our code."""

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM


def hf_model(tied: bool = True, dtype: torch.dtype = torch.bfloat16, layers: int = 2) -> Qwen2ForCausalLM:
    """A random model with 6 query heads on 2 KV heads, and biases that are not zero."""
    config = Qwen2Config(vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=layers,
                         num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256,
                         tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def read_tensors(folder) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, by the safetensors library."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equality of names, dtypes, shapes and bytes."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape
        and torch.equal(a[n].contiguous().view(torch.uint8), b[n].contiguous().view(torch.uint8)) for n in a)


def rewrite(folder, change) -> None:
    """Load the folder's tensors, let ``change`` edit the dict, and save them again."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def siblings(path):
    """Everything beside ``path``, hidden names included."""
    return sorted(p.name for p in path.parent.iterdir())
