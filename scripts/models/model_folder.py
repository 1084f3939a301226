"""The configuration and the Hugging Face folder of a new small model of the Qwen2.5 architecture."""
import json
import tempfile
from pathlib import Path

import msgspec
from bpe_tokenizer import END_OF_TEXT, IM_END, save_tokenizer
from model_recipes import ModelShape
from tokenizers import Tokenizer

from qwen_jax.checkpoint.conversion import save_hf
from qwen_jax.config import ModelConfig, Rope


def model_config(shape: ModelShape, tokenizer: Tokenizer) -> ModelConfig:
    """Return the configuration of a model of this shape, with the tokenizer's vocabulary and special tokens."""
    sizes = msgspec.structs.asdict(shape)
    rope = Rope(sizes.pop("rope_theta"))
    return ModelConfig(vocab_size=tokenizer.get_vocab_size(), rope=rope, **sizes,
                       tie_word_embeddings=True, dtype="bfloat16", bos_token_id=tokenizer.token_to_id(END_OF_TEXT),
                       eos_token_id=tokenizer.token_to_id(IM_END))


def write_folder(params, config: ModelConfig, tokenizer: Tokenizer, out: Path) -> None:
    """Write a Hugging Face folder: weights in `config`'s dtype, configuration, tokenizer, greedy generation."""
    with tempfile.TemporaryDirectory() as extras:
        save_tokenizer(tokenizer, extras, config.max_position_embeddings)
        end_of_text, im_end = config.bos_token_id, config.eos_token_id
        generation = {"bos_token_id": end_of_text, "pad_token_id": end_of_text, "do_sample": False,
                      "eos_token_id": [im_end, end_of_text]}
        (Path(extras) / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        save_hf(params, config, out, extras)
