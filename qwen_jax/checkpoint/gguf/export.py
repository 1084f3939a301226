"""Export to GGUF, llama.cpp's format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_jax.atomic import new_file
from qwen_jax.checkpoint.conversion import verify
from qwen_jax.checkpoint.gguf.tokenizer import SPLITS
from qwen_jax.checkpoint.hf_layout import hf_shapes, layout, split
from qwen_jax.checkpoint.load import iter_params, placements_for
from qwen_jax.checkpoint.safetensors_io import DTYPES, check_finite
from qwen_jax.checkpoint.source import Source, load_tokenizer, read_json, resolve
from qwen_jax.checkpoint.tensors import progress
from qwen_jax.config import ModelConfig, Yarn
from qwen_jax.errors import UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

logger = logging.getLogger(__name__)

_ROWS = 4096  # number of a matrix's rows that are widened to float32 at a time
GGUF_DTYPES = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}  # option -> ggml's name


def export_gguf(src: str | Path | Source, dst: str | Path, dtype: str = "float16") -> Path:
    """Write a model and its tokenizer as one new GGUF file, which llama.cpp runs.

    Args:
      src: a Hugging Face folder, a converted checkpoint, a hub id, or ``bundled``.
      dst: the file to create. It appears complete or not at all.
      dtype: element type of the matrices: float16, bfloat16, or q8_0 (blocks of 32 numbers in 8 bits with a float16
        scale; a matrix whose rows do not divide into blocks becomes float16). Norms and biases are float32.

    Host memory stays within a few copies of one group of tensors. Without a tokenizer the file takes token ids only.
    A tokenizer that normalises or splits text in a way that llama.cpp does not have is reported in the log.

    Returns ``dst``. Raises UserError for another dtype, bad input, an existing ``dst``, too little disk space, weights
    beyond float16's range, YaRN settings other than factor and original length, and tokenizers other than byte-level
    BPE (llama.cpp has neither).
    """
    if dtype not in GGUF_DTYPES:
        raise UserError(f"GGUF files are not written in {dtype!r}: use {', '.join(GGUF_DTYPES)}")
    import gguf

    source = resolve(src)
    config, kind = source.config, gguf.GGMLQuantizationType[GGUF_DTYPES[dtype]]
    # In llama.cpp's qwen2 the heads make up the hidden size; its seed_oss is the same network without that condition.
    heads_fill_hidden = config.num_heads * config.head_dim == config.hidden_size
    arch = gguf.MODEL_ARCH.QWEN2 if heads_fill_hidden else gguf.MODEL_ARCH.SEED_OSS
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(source.path.name if isinstance(src, Source) else Path(src).name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_architecture(writer, config)
    _add_tokenizer(writer, source, config)
    names, total = gguf.get_tensor_name_map(arch, config.num_layers), 0
    for name, shape in hf_shapes(config).items():
        stored_type = _stored_type(shape, kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored_type]
        size = prod(shape) // block * block_bytes
        writer.add_tensor_info(names.get_name(name, (".weight", ".bias")), shape, tensor_dtype=np.dtype(np.float32),
                               tensor_nbytes=size, raw_dtype=stored_type)
        total += size
    with new_file(dst, total) as file:
        verify(source)
        with progress(total, "exporting") as bar:
            try:
                writer.write_header_to_file(file)
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for name, tensor in _tensors(source, config):
                    data = _encoded(name, tensor, _stored_type(tensor.shape, kind))
                    writer.write_tensor_data(data)
                    bar.update(data.nbytes)
            finally:
                writer.close()
    return Path(dst)


def _tensors(source: Source, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the Hugging Face name and the value of each of a model's tensors, in `hf_shapes`' order."""
    table = layout(config)
    for expected, (path, parameter) in zip(table, iter_params(source, config, placements_for(config)),
                                           strict=True):
        if path != expected:  # the writer goes by the order alone
            raise RuntimeError(f"read {path} where {expected} is to be written")
        yield from split(table[path], np.asarray(parameter))
        del parameter  # else it would be alive while the next parameter is read


def _stored_type(shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Return the GGUF type in which a tensor of this shape is stored when matrices are to be ``kind``."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def _encoded(name: str, tensor: np.ndarray, stored_type: GGMLQuantizationType) -> np.ndarray:
    """Return a tensor encoded as a GGUF type: an array whose bytes are those of the file."""
    from gguf import quantize

    if stored_type.name in DTYPES:
        with np.errstate(over="ignore"):
            encoded = tensor.astype(DTYPES[stored_type.name], copy=False)
        check_finite(name, encoded)
        return encoded.view(np.uint8)  # bfloat16 arrays cannot write themselves to files
    return np.concatenate([quantize(tensor[row:row + _ROWS].astype(np.float32), stored_type)
                           for row in range(0, len(tensor), _ROWS)])


def _add_architecture(writer: GGUFWriter, config: ModelConfig) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if yarn := config.rope.yarn:
        from gguf import RopeScalingType

        if yarn != Yarn(yarn.factor, yarn.original_max_position_embeddings):
            raise UserError("llama.cpp knows YaRN by its factor and original_max_position_embeddings alone: remove "
                            "the other settings from config.json if the model does without them")
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)


def _add_tokenizer(writer: GGUFWriter, source: Source, config: ModelConfig) -> None:
    """Write the tokenizer to a GGUF file: tokens and their kinds, merges, name of the rule that splits text, special
    ids and chat template."""
    from gguf import SpecialVocab, TokenType

    facts = read_json(source.path / "tokenizer.json")
    if not facts:
        tokenizer = load_tokenizer(source)
        if tokenizer is None:
            writer.add_tokenizer_model("none")
            return
        facts = json.loads(tokenizer.backend_tokenizer.to_str())
    if facts["model"]["type"] != "BPE" or (facts["decoder"] or {}).get("type") != "ByteLevel":
        raise UserError(f"the tokenizer in {source.path} is not byte-level BPE, as Qwen2.5's is: it is not written to "
                        "GGUF; move its files away to export a model that takes token ids")
    writer.add_tokenizer_model("gpt2")
    if split_name := _split_name(facts):
        writer.add_tokenizer_pre(split_name)
    if not split_name or (facts["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        logger.warning("the tokenizer in %s normalises or splits text in a way that llama.cpp does not know: there, "
                       "text may become other tokens than here; give it token ids", source.path)
    texts = {id_: (text, TokenType.NORMAL) for text, id_ in facts["model"]["vocab"].items()}
    for token in facts["added_tokens"]:
        text = token["content"]
        control = token["special"] or (text.startswith("<|") and text.endswith("|>"))  # as llama.cpp's converter
        texts[token["id"]] = text, TokenType.CONTROL if control else TokenType.USER_DEFINED
    if max(texts) >= config.vocab_size:
        raise UserError(f"the tokenizer in {source.path} has token {max(texts)}, and the model {config.vocab_size} "
                        "tokens: one of the two is of another model")
    # Models have more rows than their tokenizers have tokens; the rest is named as llama.cpp's converter names it.
    tokens = [texts.get(id_, (f"[PAD{id_}]", TokenType.UNUSED)) for id_ in range(config.vocab_size)]
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    merges = facts["model"]["merges"]  # pairs, or in older files strings
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    SpecialVocab(source.path, n_vocab=config.vocab_size).add_to_gguf(writer)


def _split_name(tokenizer: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name for the rule by which a ``tokenizer.json`` splits text; None when it has no such rule."""
    match tokenizer["pre_tokenizer"]:
        case {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}:
            return next((name for name, known in SPLITS.items() if known == regex), None)
    return None
