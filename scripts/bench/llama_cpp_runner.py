"""Time llama.cpp's prefill and decode behind a pipe: a JSON object per line in, a JSON object per line out.

`llama_cpp.py` starts this script and says what it needs.

    {"folder": "HF", "gguf": "model.gguf", "type": "f16", "context": 1024}  ->  {"ready": true}   (the first line)
    {"tokens": [1, 2, 3], "more": 16}  ->  {"prefill": 0.2, "decode": 0.5}   (seconds)

A decode step gets its token from the request; nothing is sampled.
"""

import json
import os
import struct
import sys
import time
from pathlib import Path

import gguf
import numpy as np
from llama_cpp import Llama


def main() -> None:
    answer_to, sys.stdout = sys.stdout, sys.stderr
    setup = json.loads(sys.stdin.readline())
    write_gguf(Path(setup["folder"]), Path(setup["gguf"]), setup["type"])
    cores = os.cpu_count()
    model = Llama(setup["gguf"], n_ctx=setup["context"], n_batch=512, n_ubatch=512, n_threads=cores,
                  n_threads_batch=cores, verbose=False)
    print(json.dumps({"ready": True}), file=answer_to, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        model.reset()
        began = time.perf_counter()
        model.eval(request["tokens"])
        prefilled = time.perf_counter()
        for token in request["tokens"][:request["more"]]:
            model.eval([token])
        print(json.dumps({"prefill": prefilled - began, "decode": time.perf_counter() - prefilled}), file=answer_to,
              flush=True)


def write_gguf(folder: Path, path: Path, kind: str) -> None:
    """Write the bf16 Qwen2 of a Hugging Face folder as GGUF, without a tokenizer; matrices in ``kind``, f16 or bf16."""
    config = json.loads((folder / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
    for file in sorted(folder.glob("*.safetensors")):
        for name, bits in safetensors_bf16(file):
            values = (bits.astype(np.uint32) << 16).view(np.float32)
            if bits.ndim == 2:
                raw = gguf.GGMLQuantizationType.F16 if kind == "f16" else gguf.GGMLQuantizationType.BF16
                values = values.astype(np.float16) if kind == "f16" else np.ascontiguousarray(bits).view(np.uint8)
            else:
                raw = gguf.GGMLQuantizationType.F32
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def safetensors_bf16(file: Path):
    """Yield (name, bits as uint16) of every tensor of a safetensors file, all of which have to be bf16."""
    with open(file, "rb") as stream:
        size, = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))
    data = np.memmap(file, np.uint8, "r", offset=8 + size)
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        if tensor["dtype"] != "BF16":
            raise SystemExit(f"{name} is {tensor['dtype']}: only bf16 checkpoints are converted")
        begin, end = tensor["data_offsets"]
        yield name, data[begin:end].view(np.uint16).reshape(tensor["shape"])


if __name__ == "__main__":
    main()
