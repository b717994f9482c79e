"""What OpenAI's clients expect beside the requests themselves: errors in JSON, models by name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from voltana.hwreplay.router.body import PATHS
from voltana.hwreplay.router.errors import error_body

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """An unknown path (404) or a wrong method (405) is an OpenAI error instead of plain text."""
    try:
        return await handler(request)
    except web.HTTPMethodNotAllowed as error:
        allowed = " or ".join(sorted(error.allowed_methods))
        answer = json_error(405, f"{request.path} takes {allowed}, got {request.method}")
        answer.headers["Allow"] = error.headers["Allow"]
        return answer
    except web.HTTPNotFound:
        return json_error(404, f"the router has no {request.path}: ask {', '.join(PATHS)}")


def json_error(status: int, message: str) -> web.Response:
    """An error of the router's own as a response."""
    return web.Response(
        status=status, body=error_body(status, message), content_type="application/json"
    )


def pick_model(listing: bytes, name: str) -> web.Response:
    """The entry of one model, from a server's answer to GET /v1/models; 404 if it is not there."""
    try:
        models: list[dict[str, Any]] = msgspec.json.decode(listing)["data"]
        found = {model["id"]: model for model in models}
    except (msgspec.DecodeError, KeyError, TypeError):
        return json_error(502, "the server's list of models cannot be read")
    if name not in found:
        return json_error(404, f"no model {name!r} is served: ask for {', '.join(found)}")
    return web.Response(body=msgspec.json.encode(found[name]), content_type="application/json")
