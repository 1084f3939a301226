"""Factory of FastAPI applications with size limits, API keys, OpenAI's error objects and request records, no routes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from qwen_jax.errors import UserError
from qwen_jax.serving.http.limits import Keys, Limits
from qwen_jax.serving.http.openai_objects import VERSION
from qwen_jax.serving.http.request_log import Observed, Observer
from qwen_jax.serving.ipc.errors import ApiError

# Statuses that every route may answer with, for the OpenAPI schema.
ERRORS = {status: {"description": "An error object."}
          for status in (400, 401, 403, 404, 405, 408, 409, 413, 429, 431, 500, 503)}
Middleware = Callable[[Any], Any]  # from an ASGI application to another one around it


def new_app(title: str, observers: Sequence[Observer], keys: Keys, max_body_bytes: int,
            inner: Middleware | None = None) -> FastAPI:
    """Return a FastAPI application without routes that checks size and API key and answers errors as OpenAI's objects.

    Args:
      observers: called with the record of every request that has ended.
      inner: middleware that runs after the checks of size and API key and before the routes.
    """
    app = FastAPI(title=title, version=VERSION, responses=ERRORS, docs_url=None, redoc_url=None)
    if inner:
        app.add_middleware(inner)
    app.add_middleware(Limits, keys=keys, max_body_bytes=max_body_bytes)
    app.add_middleware(Observed, observers=observers)  # the last is the outermost
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(RecursionError, _too_deep)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ValidationError, _invalid)  # of the chat that another body stands for
    app.add_exception_handler(HTTPException, _http_error)
    fastapi_schema = app.openapi

    def openapi():
        """Return FastAPI's OpenAPI schema without status 422, its status for a bad body, which is 400 here."""
        schema = fastapi_schema()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return schema

    app.openapi = openapi
    return app


async def _api_error(request: Request, error: ApiError) -> Response:
    body = msgspec.json.encode(error.body_for(request.url.path))
    return Response(body, error.status, error.headers, "application/json")


async def _user_error(request: Request, error: UserError) -> Response:
    return await _api_error(request, ApiError(400, str(error)))


async def _too_deep(request: Request, _error: RecursionError) -> Response:
    return await _api_error(request, ApiError(400, "the body must be nested less deeply"))


async def _invalid(request: Request, error: RequestValidationError | ValidationError) -> Response:
    """Answer a request whose body does not fit the schema: status 400, with the first wrong field.

    Where a field may have several forms, it is the one of the form that fits furthest.
    """
    first = max(error.errors(), key=lambda one: len(one["loc"]))
    place = [str(part) for part in first["loc"] if part != "body" and "[" not in str(part)]  # names of types
    where = f"{'.'.join(place)}: " if place else ""
    return await _api_error(request, ApiError(400, where + first["msg"], param=place[0] if place else None))


async def _http_error(request: Request, error: HTTPException) -> Response:
    """Answer an unknown route or method with OpenAI's error object in the place of Starlette's text."""
    route = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return await _api_error(request, ApiError(404, f"there is no {route}"))
    if error.status_code == 405:
        answer = await _api_error(request, ApiError(405, f"there is no {route}"))
        answer.headers.update(error.headers or {})
        return answer
    return await _api_error(request, ApiError(400, str(error.detail)))
