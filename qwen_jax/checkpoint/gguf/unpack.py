"""Files of a Hugging Face folder, made from what a GGUF file says beside its weights.

The folder lies in the user's cache, so that a file is parsed once: that takes seconds. It holds ``config.json``,
``generation_config.json``, the tokenizer, the places of the tensors, and links to the GGUF files. Keys of the format
are in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import atexit
import json
import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from qwen_kernels.cache import cache_root

from qwen_jax.atomic import new_folder
from qwen_jax.checkpoint.gguf.tensors import TABLE
from qwen_jax.checkpoint.gguf.tokenizer import END_TEXTS, special_ids, tokenizer_files
from qwen_jax.checkpoint.hf_layout import EMBEDDING, HEAD, hf_shapes
from qwen_jax.config import ModelConfig
from qwen_jax.contents import digest_of
from qwen_jax.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader

logger = logging.getLogger(__name__)

FORMAT = 1  # to be raised when another folder would be made from the same file
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_PASSED_OVER = ("rope_freqs.weight",)
_SAMPLING = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
             "penalty_repeat": "repetition_penalty"}


def unpack(file: Path) -> Path:
    """Return a folder that describes the model in a GGUF file, or in the parts of which the file is one.

    Raises UserError for a damaged file, a missing part, another architecture, and types and tokenizers that are not
    read.
    """
    parts = parts_of(file)
    states = [(str(part.resolve()), part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    folder = cache_root() / "gguf" / f"{file.stem}-{digest_of((FORMAT, states))[:12]}"
    if folder.is_dir():
        return folder
    files = _describe(parts)
    try:
        _write(folder, files, parts)
    except UserError as error:
        if not folder.is_dir():  # else another process has written it meanwhile
            logger.warning("%s: GGUF files are parsed at each start", error)
            parent = Path(tempfile.mkdtemp(prefix="qwen-jax-gguf-"))
            atexit.register(shutil.rmtree, parent, ignore_errors=True)
            folder = parent / file.stem
            _write(folder, files, parts)
    return folder


def parts_of(file: Path) -> list[Path]:
    """Return the files into which a GGUF model is split, in order; UserError when one is missing."""
    match = _PART.fullmatch(file.name)
    if not match:
        return [file]
    name, _, count = match.groups()
    parts = [file.parent / f"{name}-{number:05d}-of-{count}.gguf" for number in range(1, int(count) + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise UserError(f"{file} is one of {int(count)} parts, and {missing[0]} is missing: download it too")
    return parts


def _describe(parts: list[Path]) -> dict[str, Any]:
    """Return the contents of the files that describe a model, by their names."""
    readers = [_open(part) for part in parts]
    facts = {name: field.contents() for name, field in readers[0].fields.items() if not name.startswith("GGUF.")}
    table = _places(readers, parts)
    hf_config = _config(facts, table, parts[0])
    names = _names(ModelConfig.from_hf(hf_config), facts["general.architecture"])
    return {"config.json": hf_config, "generation_config.json": _generation(facts),
            TABLE: {names.get(name, name): place for name, place in table.items() if name not in _PASSED_OVER},
            **tokenizer_files(facts, str(parts[0]))}


def _write(folder: Path, files: dict[str, Any], parts: list[Path]) -> None:
    """Write JSON files, and links to a model's GGUF files, into a new folder."""
    with new_folder(folder, 0) as temporary:
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, ensure_ascii=False))
        for number, part in enumerate(parts):
            (temporary / f"{number}.gguf").symlink_to(part.resolve())


def _open(part: Path) -> GGUFReader:
    import gguf

    try:
        reader = gguf.GGUFReader(part)
    except Exception as error:  # the reader has no errors of its own: it fails where it cannot go on
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{part} is not a GGUF file, or is damaged ({reason}): download it again") from None
    if reader.byte_order == "S":
        raise UserError(f"{part} has the byte order of another machine, which is not read")
    return reader


def _places(readers: list[GGUFReader], parts: list[Path]) -> dict[str, dict[str, Any]]:
    """Return the place of each tensor by its name in the file: the fields of `tensors._Location`."""
    from gguf import GGML_QUANT_SIZES, dequantize

    table, kinds = {}, set()
    for number, reader in enumerate(readers):
        size = parts[number].stat().st_size
        for tensor in reader.tensors:
            if tensor.data_offset + tensor.n_bytes > size:
                raise UserError(f"{parts[number]} is truncated inside {tensor.name}: download it again")
            kinds.add(tensor.tensor_type)
            table[tensor.name] = {"file": f"{number}.gguf", "kind": tensor.tensor_type.name,
                                  "shape": [int(size) for size in reversed(tensor.shape)],
                                  "offset": int(tensor.data_offset), "nbytes": int(tensor.n_bytes)}
    for kind in kinds:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise UserError(f"{parts[0]} has weights of the type {kind.name}, which are not read: use a file with "
                            "another quantisation") from None
    return table


def _config(facts: dict[str, Any], table: dict[str, dict[str, Any]], file: Path) -> dict[str, Any]:
    """Return a ``config.json`` from a GGUF file's keys."""
    arch = facts.get("general.architecture")
    if arch not in ("qwen2", "seed_oss"):  # the latter is what models with other head sizes are exported as
        raise UserError(f"{file} is not a Qwen2.5 model: architecture {arch}")

    def key(name: str, *default: Any) -> Any:
        if f"{arch}.{name}" in facts:
            value = facts[f"{arch}.{name}"]
            return float(f"{value:.7g}") if isinstance(value, float) else value  # stored in float32
        if default:
            return default[0]
        raise UserError(f"{file} lacks {arch}.{name}: it is damaged, or not a whole model")

    if "token_embd.weight" not in table:
        raise UserError(f"{file} lacks token_embd.weight: it is damaged, or not a whole model")
    heads, hidden = key("attention.head_count"), key("embedding_length")
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden,
        "intermediate_size": key("feed_forward_length"), "num_hidden_layers": key("block_count"),
        "num_attention_heads": heads, "num_key_value_heads": key("attention.head_count_kv", heads),
        "head_dim": key("attention.key_length", hidden // heads), "hidden_act": "silu",
        "max_position_embeddings": key("context_length"), "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
        "rope_theta": key("rope.freq_base", 10_000.0), "tie_word_embeddings": "output.weight" not in table,
        "vocab_size": table["token_embd.weight"]["shape"][0], "torch_dtype": "bfloat16", **special_ids(facts),
    }
    scaling = key("rope.scaling.type", "none")
    if scaling == "yarn":
        config["rope_scaling"] = {"rope_type": "yarn", "factor": key("rope.scaling.factor"),
                                  "original_max_position_embeddings": key("rope.scaling.original_context_length")}
    elif scaling != "none":
        raise UserError(f"{file} extends its context by {scaling!r}, which is not implemented: only yarn is")
    return config


def _generation(facts: dict[str, Any]) -> dict[str, Any]:
    """Return a ``generation_config.json``: the tokens that end an answer, and sampling settings if the file has any."""
    tokens = facts.get("tokenizer.ggml.tokens") or []
    ids = special_ids(facts)
    ends = [ids["eos_token_id"]] if "eos_token_id" in ids else []
    ends += [tokens.index(text) for text in END_TEXTS if text in tokens and tokens.index(text) not in ends]
    sampling = {ours: facts[f"general.sampling.{theirs}"] for theirs, ours in _SAMPLING.items()
                if f"general.sampling.{theirs}" in facts}
    padding = {"pad_token_id": facts["tokenizer.ggml.padding_token_id"]} if (
        "tokenizer.ggml.padding_token_id" in facts) else {}
    return {**padding, **({"eos_token_id": ends} if ends else {}), **({"do_sample": True} if sampling else {}),
            **sampling}


def _names(config: ModelConfig, arch: str) -> dict[str, str]:
    """Return Hugging Face's name of each tensor by its name in GGUF."""
    import gguf

    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_layers)
    wanted = [*hf_shapes(config), HEAD, EMBEDDING]
    return {names.get_name(name, (".weight", ".bias")): name for name in wanted}
