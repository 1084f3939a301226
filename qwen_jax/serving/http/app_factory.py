"""An application without routes: limits, keys, error objects, observers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from qwen_jax.errors import UserError
from qwen_jax.serving.http.limits import Limits
from qwen_jax.serving.http.openai_objects import VERSION
from qwen_jax.serving.http.request_log import Observed, Observer
from qwen_jax.serving.ipc.errors import ApiError

ERRORS = {status: {"description": "An error object."}
          for status in (400, 401, 404, 405, 408, 409, 413, 429, 431, 500, 503)}


Inner = Callable[[Any], Any]  # an ASGI application around another one


def new_app(title: str, observers: Sequence[Observer], keys: Sequence[bytes], body_bytes: int,
            inner: Inner | None = None) -> FastAPI:
    """Whose errors are OpenAI's objects. keys: of which a request has to have one; none for everybody. inner: see
    `create_app`."""
    app = FastAPI(title=title, version=VERSION, responses=ERRORS, docs_url=None, redoc_url=None)
    if inner:
        app.add_middleware(inner)
    app.add_middleware(Limits, keys=keys, body_bytes=body_bytes)
    app.add_middleware(Observed, observers=observers)  # the last is the outermost
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    described = app.openapi

    def openapi():
        """FastAPI's, without the status that it gives to bad bodies: here that is 400."""
        schema = described()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return schema

    app.openapi = openapi
    return app


async def _api_error(_request: Request, error: ApiError) -> Response:
    return Response(msgspec.json.encode(error.body), error.status, error.headers, "application/json")


async def _user_error(request: Request, error: UserError) -> Response:
    return await _api_error(request, ApiError(400, str(error)))


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    where = f"{'.'.join(place)}: " if place else ""
    return await _api_error(request, ApiError(400, where + first["msg"], param=place[0] if place else None))


async def _http_error(request: Request, error: HTTPException) -> Response:
    there = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return await _api_error(request, ApiError(404, f"there is no {there}"))
    if error.status_code == 405:
        answer = await _api_error(request, ApiError(405, f"there is no {there}"))
        answer.headers.update(error.headers or {})
        return answer
    return await _api_error(request, ApiError(400, str(error.detail)))
