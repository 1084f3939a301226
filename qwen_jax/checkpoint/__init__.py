"""Reading and writing of models: Hugging Face folders, Orbax checkpoints, exports, tokenizers, calibration files."""

from qwen_jax.checkpoint.conversion import convert, export, save_hf, verify
from qwen_jax.checkpoint.gguf.export import export_gguf
from qwen_jax.checkpoint.load import from_transformers, iter_params, load_model, load_params
from qwen_jax.checkpoint.precision_file import read_calibrated, write_calibrated
from qwen_jax.checkpoint.safetensors_io import check_finite
from qwen_jax.checkpoint.source import Source, find_config, load_generation_config, load_tokenizer, resolve
from qwen_jax.checkpoint.sparsity_file import read_sparsity, write_sparsity
from qwen_jax.checkpoint.stablehlo import export_stablehlo

__all__ = ["Source", "check_finite", "convert", "export", "export_gguf", "export_stablehlo", "find_config",
           "from_transformers", "iter_params", "load_generation_config", "load_model", "load_params", "load_tokenizer",
           "read_calibrated", "read_sparsity", "resolve", "save_hf", "verify", "write_calibrated", "write_sparsity"]
