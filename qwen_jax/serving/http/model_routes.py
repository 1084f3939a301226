"""Routes that list the model and its LoRA adapters, and load and unload adapters."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from qwen_jax.serving.http.protocol import AdapterRequest
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.ipc.errors import ApiError


def model_routes(service: Service) -> APIRouter:
    """Return a router with the routes that list models and load and unload LoRA adapters."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models() -> Any:
        """List the model and the loaded LoRA adapters, all of which requests may name as ``model``."""
        names = [service.model, *sorted(service.adapters)]
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "qwen-jax",
                                            "parent": service.model if name in service.adapters else None}
                                           for name in names]}

    @routes.post("/v1/load_lora_adapter")
    async def load_adapter(body: AdapterRequest) -> Any:
        """Load a LoRA adapter from a folder on the server; requests may then name it as ``model``."""
        body.check_fields()
        if body.lora_path is None:
            raise ApiError(400, "lora_path is missing", param="lora_path")
        if body.lora_name == service.model:
            raise ApiError(400, f"{body.lora_name!r} is the model's name", param="lora_name")
        await service.link.call("load_adapter", body.lora_name, body.lora_path)
        service.adapters.add(body.lora_name)
        return {"status": f"{body.lora_name} is loaded"}

    @routes.post("/v1/unload_lora_adapter")
    async def unload_adapter(body: AdapterRequest) -> Any:
        """Unload the LoRA adapter with the given name."""
        body.check_fields()
        if body.lora_name not in service.adapters:
            raise ApiError(404, f"no adapter named {body.lora_name!r} is loaded", "model_not_found", "lora_name")
        await service.link.call("unload_adapter", body.lora_name)
        service.adapters.discard(body.lora_name)
        return {"status": f"{body.lora_name} is unloaded"}

    return routes
