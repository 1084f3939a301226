"""The tokenizer in a GGUF file, as the files of a Hugging Face folder, and the rules by which text is split."""

from __future__ import annotations

from typing import Any

from qwen_jax.errors import UserError

QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")
# llama.cpp has its rules for splitting text before byte pairs are merged built in, and a file names the rule to use.
# All Qwen2.5 models have this one; the second name is that of models which DeepSeek distilled into them.
SPLITS = {"qwen2": QWEN2, "deepseek-r1-qwen": QWEN2}
END_TEXTS = ("<|im_end|>", "<|endoftext|>")
# Qwen2.5's released tokenizers do not hide these from decoded text; GGUF knows one kind of control token only.
_SHOWN = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # gguf.TokenType


def special_ids(facts: dict[str, Any]) -> dict[str, int]:
    """Return the ids of the tokens that begin and end a text, as far as a file's keys name them."""
    return {f"{name}_token_id": int(facts[f"tokenizer.ggml.{name}_token_id"]) for name in ("bos", "eos")
            if f"tokenizer.ggml.{name}_token_id" in facts}


def tokenizer_files(facts: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Return ``tokenizer.json`` and ``tokenizer_config.json`` from a GGUF file's keys; nothing when it has no tokens.

    Raises UserError for another kind of tokenizer, and for a rule of splitting text that is not known; ``where`` is
    the file for the message.
    """
    kind, rule = facts.get("tokenizer.ggml.model", "none"), facts.get("tokenizer.ggml.pre", "qwen2")
    if kind == "none":
        return {}
    if kind != "gpt2" or rule not in SPLITS:
        raise UserError(f"the tokenizer in {where} is of the kind {kind!r} and splits text by the rule {rule!r}: only "
                        f"byte-level BPE with the rules {', '.join(SPLITS)} is read")
    words, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    added = [{"id": id_, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": kinds[id_] == _CONTROL and word not in _SHOWN}
             for id_, word in enumerate(words) if kinds[id_] in (_CONTROL, _USER_DEFINED)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLITS[rule]}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
             "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": {word: id_ for id_, word in enumerate(words) if kinds[id_] == _NORMAL},
             "merges": [merge.split(" ") for merge in facts["tokenizer.ggml.merges"]]}
    named = {"eos_token": "tokenizer.ggml.eos_token_id", "pad_token": "tokenizer.ggml.padding_token_id"}
    if facts.get("tokenizer.ggml.add_bos_token"):
        named["bos_token"] = "tokenizer.ggml.bos_token_id"
    template = facts.get("tokenizer.chat_template")
    return {
        "tokenizer.json": {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
                           "normalizer": {"type": "NFC"}, "post_processor": level, "decoder": level, "model": model,
                           "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "errors": "replace",
            "add_prefix_space": False, **{name: words[facts[key]] for name, key in named.items() if key in facts},
            **({"chat_template": template} if template else {})},
    }
