"""A new small model of the Qwen2.5 architecture, from a recipe's shape and a tokenizer to a Hugging Face folder."""
import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer

from qwen_jax.checkpoint.conversion import save_hf
from qwen_jax.config import ModelConfig, Rope
from qwen_jax.training.recipe import ModelShape
from qwen_jax.training.tokenizer import END_OF_TEXT, IM_END, save_tokenizer


def model_config(shape: ModelShape, tokenizer: Tokenizer) -> ModelConfig:
    sizes = {name: value for name, value in vars(shape).items() if name != "rope_theta"}
    return ModelConfig(vocab_size=tokenizer.get_vocab_size(), **sizes, rope=Rope(shape.rope_theta),
                       tie_word_embeddings=True, dtype="bfloat16", bos_token_id=tokenizer.token_to_id(END_OF_TEXT),
                       eos_token_id=tokenizer.token_to_id(IM_END))


def write_folder(params, config: ModelConfig, tokenizer: Tokenizer, out: Path) -> None:
    """The Hugging Face folder: weights in `config`'s dtype, configuration, tokenizer, greedy generation defaults."""
    with tempfile.TemporaryDirectory() as side:
        save_tokenizer(tokenizer, side, config.max_position_embeddings)
        end_of_text, im_end = config.bos_token_id, config.eos_token_id
        generation = {"bos_token_id": end_of_text, "pad_token_id": end_of_text, "do_sample": False,
                      "eos_token_id": [im_end, end_of_text]}
        (Path(side) / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        save_hf(params, config, out, side)
