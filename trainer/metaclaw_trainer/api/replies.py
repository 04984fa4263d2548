"""Every error of the trainer as an HTTP answer: ``{"error": {"message", "type", "code"}}`` and the right status."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from metaclaw_hooks.errors import HooksError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from metaclaw_trainer import errors

log = logging.getLogger(__name__)

# From the special to the general: the first match decides.
_STATUS: tuple[tuple[type[Exception], int, str], ...] = (
    (errors.UnknownAgentError, 404, "unknown_agent"),
    (errors.UnknownSessionError, 404, "unknown_session"),
    (errors.UnknownAdapterError, 404, "unknown_session"),
    (errors.UnknownVersionError, 404, "unknown_version"),
    (errors.UnknownLossError, 422, "unknown_loss"),
    (errors.InvalidDatumError, 422, "invalid_datum"),
    (errors.BadSamplingError, 422, "bad_sampling"),
    (errors.AdapterExistsError, 409, "conflict"),
    (errors.ConflictError, 409, "conflict"),
    (errors.CheckpointRefusedError, 409, "checkpoint_refused"),
    (errors.NonFiniteError, 422, "non_finite"),
    (errors.TooManySessionsError, 429, "too_many_sessions"),
    (errors.QueueFullError, 429, "queue_full"),
    (errors.OutOfMemoryError, 503, "out_of_memory"),
    (errors.EngineStoppedError, 503, "shutting_down"),
    (errors.StoreError, 503, "store_unavailable"),
    (errors.VllmUnavailableError, 503, "vllm_unavailable"),
    (errors.VllmRefusedError, 503, "vllm_refused"),
    (errors.CheckpointError, 503, "checkpoint_failed"),
    (errors.KeyFileError, 503, "key_file"),
    (errors.TrainerError, 500, "trainer_error"),
    (HooksError, 422, "invalid_request"),
)
_RETRY_AFTER = {429: "5", 503: "2"}


def error_response(status: int, message: str, code: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The one form that errors take."""
    kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    fallback = "invalid_request_error" if status < 500 else "server_error"
    extra = {"retry-after": _RETRY_AFTER[status]} if status in _RETRY_AFTER else {}
    body = {"error": {"message": message, "type": kind.get(status, fallback), "code": code}}
    return JSONResponse(body, status, headers={**extra, **(headers or {})})


def install(app: FastAPI) -> None:
    """Answer every error of ours, and every one that is not, in that form."""

    async def ours(_request: Request, error: Exception) -> JSONResponse:
        for kind, status, code in _STATUS:
            if isinstance(error, kind):
                if status >= 500:
                    log.error("%s: %s", code, error)
                return error_response(status, str(error), code)
        return await unforeseen(_request, error)

    async def http(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = {404: "unknown_route", 405: "method_not_allowed", 413: "body_too_large"}.get(
            error.status_code, "invalid"
        )
        return error_response(error.status_code, str(error.detail), code, error.headers)

    async def invalid(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(422, explain(error.errors()), "invalid_request")

    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(500, "the trainer failed on this request; its log says why", "internal_error")

    async def gone(request: Request, _error: Exception) -> JSONResponse:
        log.info("%s %s: the caller went away before all was sent", request.method, request.url.path)
        return error_response(400, "the request was not sent whole", "incomplete")

    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(errors.TrainerError, ours)
    app.add_exception_handler(HooksError, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unforeseen)


def explain(found: object, limit: int = 5) -> str:
    """pydantic's list of errors on one line, values left out: they may be a user's."""
    lines = []
    entries = list(found) if isinstance(found, list | tuple) else []
    for entry in entries[:limit]:
        place = ".".join(str(part) for part in entry.get("loc", ()) if part != "body")
        lines.append(f"{place}: {entry.get('msg', 'invalid')}" if place else str(entry.get("msg", "invalid")))
    more = f"; and {len(entries) - limit} more" if len(entries) > limit else ""
    return "; ".join(lines) + more
