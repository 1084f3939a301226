"""Finding a model and its files: a Hugging Face folder, a converted checkpoint, a hub id, or the bundled model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from qwen_jax.checkpoint.gguf.unpack import parts_of, unpack
from qwen_jax.checkpoint.hf_layout import check_shapes
from qwen_jax.checkpoint.quantized import SETTINGS_FILES, scheme_of
from qwen_jax.config import PRESETS, GenerationDefaults, ModelConfig
from qwen_jax.contents import FileSet
from qwen_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MANIFEST, PARAMS = "qwen_jax.json", "params"
FORMAT_VERSION = 1
KINDS = {"hf": "Hugging Face", "orbax": "converted", "gguf": "from GGUF"}
SHIPPED = {name: Path(__file__).resolve().parent.parent / name for name in ("bundled", "student", "yardstick")}

SPARSITY = "sparse_attention.json"  # how sparse the model's attention may be
EIGHT_BIT = "eight_bit.json"  # which parameters and KV caches may be 8-bit
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
                   "added_tokens.json", "chat_template.jinja", "chat_template.json")
SIDE_FILES = (GENERATION_CONFIG, *TOKENIZER_FILES, SPARSITY, EIGHT_BIT, "LICENSE", "NOTICE")
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?")


class Source(NamedTuple):
    """A folder that holds a model, and how its weights are stored there.

    Of a GGUF file the folder is one in the cache, with links to the file and its parts (`gguf.unpack`).
    """

    kind: Literal["hf", "orbax", "gguf"]
    path: Path

    @property
    def config(self) -> ModelConfig:
        """Architecture of the model, read from ``config.json``; UserError when it is not implemented."""
        return ModelConfig.from_hf(self.path)

    @property
    def params(self) -> Path:
        """Folder of a converted checkpoint in which Orbax stores the parameters."""
        return self.path / PARAMS

    @property
    def files(self) -> FileSet:
        """The files that decide what the model answers: weights, tokenizer, settings."""
        names = {"config.json", MANIFEST, *SIDE_FILES, *SETTINGS_FILES}
        found = [file for file in self.path.iterdir()
                 if file.name in names or file.name.endswith((".safetensors", ".safetensors.index.json", ".gguf"))]
        found += [file for file in self.params.rglob("*") if file.is_file()] if self.kind == "orbax" else []
        return FileSet.of(self.path, found)


def resolve(ref: str | Path | Source) -> Source:
    """Find the folder of a model: a local one or that of a GGUF file first, then one shipped with this package
    (`SHIPPED`), then a hub id, which is downloaded; ``OWNER/NAME:Q4_K_M`` is a GGUF file of a hub repository.

    Raises UserError for any other reference, for quantised weights that are not read, and for another architecture (a
    hub model's config is read before its weights are downloaded).
    """
    if isinstance(ref, Source):
        return ref
    path = Path(ref).expanduser()
    if not path.exists():
        if str(ref) in SHIPPED:
            path = SHIPPED[str(ref)]
        elif match := _HUB_ID.fullmatch(str(ref)):
            path = _download(*match.groups())
        if not path.exists():
            raise UserError(f"no model at {ref}: give a Hugging Face folder, a converted checkpoint, a GGUF file, a "
                            "hub id such as Qwen/Qwen2.5-0.5B-Instruct, or 'bundled'")
    if path.is_dir() and not (path / "config.json").is_file() and any(path.glob("*.gguf")):
        path = _gguf_file(path)
    if path.suffix == ".gguf" and path.is_file():
        return Source("gguf", unpack(path))
    if not path.is_dir():
        raise UserError(f"{path} is a file: give the folder that holds config.json and the weights, or a GGUF file")
    if (path / MANIFEST).is_file():
        return Source("orbax", path)
    source = Source("hf", path)
    source.config  # noqa: B018  reading it refuses a missing file and another architecture
    scheme_of(read_json(path / "config.json"), path)  # refuses other quantised weights
    return source


def _gguf_file(folder: Path) -> Path:
    """Return the GGUF file in a folder, or the first of its parts; UserError when there are several models."""
    models = sorted({parts_of(file)[0] for file in folder.glob("*.gguf")})
    if len(models) > 1:
        raise UserError(f"{folder} holds several GGUF models: name one of {', '.join(file.name for file in models)}")
    return models[0]


def find_config(ref: str | Path) -> tuple[ModelConfig, str]:
    """Return the architecture of a model or of a preset such as ``qwen2.5-7b``, and a text that says where it is."""
    name = str(ref)
    looks_like_preset = "/" not in name or name.lower().removeprefix("qwen/") in PRESETS
    if looks_like_preset and name not in SHIPPED and not Path(ref).exists():
        return ModelConfig.preset(name), "preset"
    source = resolve(ref)
    return source.config, f"{source.path} ({KINDS[source.kind]})"


def read_manifest(source: Source) -> dict[str, Any]:
    """Read a converted checkpoint's manifest, and check it against the files and ``config.json`` beside it.

    Raises UserError when the manifest is damaged, from another version, or of another model, and when a file is
    missing or has another length (checked here, because Orbax logs pages about it).
    """
    manifest = read_json(source.path / MANIFEST)
    version, tensors, files = (manifest.get(key) for key in ("format_version", "tensors", "files"))
    if version is not None and version != FORMAT_VERSION:
        raise UserError(f"{source.path} has checkpoint format {version}, this version reads {FORMAT_VERSION}: convert "
                        "the model again")
    if not isinstance(tensors, Mapping) or not isinstance(files, Mapping):
        raise UserError(f"{source.path / MANIFEST} is damaged: convert the model again")
    for name, size in files.items():
        file = source.path / name
        if not file.is_file() or file.stat().st_size != size:
            state = "truncated" if file.is_file() else "missing"
            raise UserError(f"{file} is {state}, the checkpoint is damaged: copy or convert it again")
    check_shapes(source.config, {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}, str(source.path))
    return manifest


def load_generation_config(source: Source) -> GenerationDefaults:
    """Return a model's generation defaults from ``generation_config.json``, or from its config without that file."""
    return GenerationDefaults.from_hf(read_json(source.path / GENERATION_CONFIG), source.config)


def load_tokenizer(source: Source) -> PreTrainedTokenizerFast | None:
    """Load the model's fast tokenizer, with its chat template; None when the folder has no tokenizer.

    Where there is a ``tokenizer.json`` it is used as it is: transformers' class for Qwen2 takes the vocabulary alone
    from it, and replaces the rules that normalise, split and decode text by its own.
    """
    files = {name for name in TOKENIZER_FILES if (source.path / name).is_file()}
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
        return None
    # A second to import, so only where text is needed. AutoTokenizer would import torch: two seconds more.
    if "tokenizer.json" in files:
        from transformers import PreTrainedTokenizerFast as kind
    else:
        from transformers import AutoTokenizer as kind
    try:
        return kind.from_pretrained(source.path, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the tokenizer in {source.path} cannot be read ({reason}): download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object; return ``{}`` when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(value, Mapping):
        raise UserError(f"{path} is not a JSON object")
    return dict(value)


def copy_side_files(src: Path, dst: Path, config: ModelConfig | None = None) -> None:
    """Copy a model folder's tokenizer, generation defaults, licence and calibration files, as far as it has them.

    config: of the model in ``dst``, when it may differ from the model in ``src``. Calibration files are measured layer
    by layer, so they are not copied to a model of another shape.
    """
    same_shape = config is None or not (src / "config.json").is_file() or shape_of(config) == shape_of(
        ModelConfig.from_hf(src))
    for name in SIDE_FILES:
        if (src / name).is_file() and (same_shape or name not in (SPARSITY, EIGHT_BIT)):
            shutil.copyfile(src / name, dst / name)


def shape_of(config: ModelConfig) -> tuple[int, ...]:
    """Return the numbers that decide the shapes of a model's weights."""
    return (config.num_layers, config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads,
            config.head_dim, config.vocab_size)


def _download(repo: str, kind: str | None = None) -> Path:
    """Download a hub model's config, tokenizer and safetensors, or find them in the hub's cache; return the folder.

    kind: the quantisation of a GGUF file, as its name says it; then only this file is downloaded, and returned.
    """
    from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        if kind:
            files = _of_kind(repo, kind, list_repo_files(repo))
            return Path(snapshot_download(repo, allow_patterns=files)) / files[0]
        try:
            config = read_json(Path(hf_hub_download(repo, "config.json")))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # a subclass that means "offline, and not in the cache"
                raise
            raise UserError(f"{repo} has no config.json, as GGUF releases have none: name one of its files by its "
                            f"quantisation, as in {repo}:Q4_K_M") from None
        ModelConfig.from_hf(config)  # refuse before gigabytes are fetched
        scheme_of(config)
        return Path(snapshot_download(repo, allow_patterns=["config.json", *SIDE_FILES, *SETTINGS_FILES,
                                                            "*.safetensors", "*.safetensors.index.json"]))
    except UserError:
        raise
    except Exception as error:  # offline, no such repository, gated, proxy: each is reported in one line
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{repo} is neither a local folder nor could it be downloaded: {reason}") from error


def _of_kind(repo: str, kind: str, files: list[str]) -> list[str]:
    """Return the GGUF file of a quantisation among a repository's files, or its parts in order.

    Raises UserError unless there is exactly one such model.
    """
    models: dict[str, list[str]] = {}
    for file in sorted(file for file in files if file.endswith(".gguf")):
        models.setdefault(re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", file), []).append(file)
    named = [name for name in models if re.search(rf"(^|[-._/]){re.escape(kind)}$", name, re.IGNORECASE)]
    if len(named) != 1:
        raise UserError(f"{repo} has {len(named) or 'no'} GGUF models called {kind}: name one of "
                        f"{', '.join(models) or 'another repository'}")
    return models[named[0]]
