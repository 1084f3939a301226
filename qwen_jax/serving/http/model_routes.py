"""Routes that list the model and its LoRA adapters, and load and unload adapters."""

from __future__ import annotations

import asyncio
from pathlib import Path
from stat import S_ISREG
from typing import Any

from fastapi import APIRouter, Request

from qwen_jax.serving.http.protocol import AdapterRequest
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.ipc.errors import ApiError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def model_routes(service: Service) -> APIRouter:
    """Return a router with the routes that list models and load and unload LoRA adapters."""
    routes = APIRouter()

    def check(body: AdapterRequest, request: Request) -> None:
        """Raise ApiError unless adapters can be loaded and the caller may change them: all clients can use them."""
        body.check_fields()
        service.link.check_alive()
        if not service.link.facts.max_adapters:
            raise ApiError(400, "this server takes no adapters: start it with --max-adapters 1 or more")
        if not service.options.public_adapters and not request.scope["caller"].admin:
            raise ApiError(403, "loading and unloading adapters needs an admin key (--admin-keys) as Authorization: "
                           "Bearer KEY, or a server with --public-adapters")

    def card(name: str) -> dict[str, Any]:
        """Return OpenAI's model object, with the limit by vLLM's name."""
        facts = service.link.facts
        return {"id": name, "object": "model", "created": 0, "owned_by": "qwen-jax",
                "parent": service.model if name in service.adapters else None,
                "max_model_len": facts and facts.max_seq_len}

    @routes.get("/v1/models")
    async def models() -> Any:
        """List the model and the loaded LoRA adapters, all of which requests may name as ``model``."""
        return {"object": "list", "data": [card(name) for name in (service.model, *sorted(service.adapters))]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        """Return one model or LoRA adapter; 404 for any other name."""
        service.adapter(name)
        return card(name)

    @routes.post("/v1/load_lora_adapter")
    async def load_adapter(body: AdapterRequest, request: Request) -> Any:
        """Load a LoRA adapter from a folder on the server; requests may then name it as ``model``."""
        check(body, request)
        if body.lora_path is None:
            raise ApiError(400, "lora_path is missing", param="lora_path")
        if body.lora_name == service.model:
            raise ApiError(400, f"{body.lora_name!r} is the model's name", param="lora_name")
        folder = await asyncio.to_thread(find_adapter, service.options.adapter_dir, body.lora_path)
        await service.link.call("load_adapter", body.lora_name, folder)
        service.adapters.add(body.lora_name)
        return {"status": f"{body.lora_name} is loaded"}

    @routes.post("/v1/unload_lora_adapter")
    async def unload_adapter(body: AdapterRequest, request: Request) -> Any:
        """Unload the LoRA adapter with the given name."""
        check(body, request)
        if body.lora_name not in service.adapters:
            raise ApiError(404, f"no adapter named {body.lora_name!r} is loaded", "model_not_found", "lora_name")
        await service.link.call("unload_adapter", body.lora_name)
        service.adapters.discard(body.lora_name)
        return {"status": f"{body.lora_name} is unloaded"}

    return routes


def find_adapter(root: str | None, path: str) -> str:
    """Return the path of an adapter's folder, of which only the two files are looked at.

    Args:
      root: the folder inside of which adapters are, also where links lead.
      path: the adapter's folder as a client gives it; a relative one begins at ``root``.
    Raises:
      ApiError: there is no such adapter inside of ``root``.
    """
    if root is None:
        raise ApiError(400, "this server loads no adapters from its disk: start it with --adapter-dir FOLDER")
    try:
        inside = Path(root).resolve()
        folder = inside / path
        if not all(place.resolve().is_relative_to(inside) for place in (folder, *map(folder.joinpath, ADAPTER_FILES))):
            raise ApiError(400, f"lora_path must be a folder inside of that of --adapter-dir, not {path!r:.200}",
                           param="lora_path")
        stats = [(folder / name).stat() for name in ADAPTER_FILES]
    except (OSError, ValueError, RuntimeError) as error:  # such as a name too long, a null byte, a circle of links
        raise _no_adapter(path) from error
    if not all(S_ISREG(stat.st_mode) for stat in stats):  # a pipe would be waited for
        raise _no_adapter(path)
    return str(folder)


def _no_adapter(path: str) -> ApiError:
    return ApiError(400, f"lora_path must be a folder with {' and '.join(ADAPTER_FILES)}, not {path!r:.200}",
                    param="lora_path")
