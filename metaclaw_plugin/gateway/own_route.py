"""A route of our own: its errors as the error body that clients of the gateway know."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException

from metaclaw_plugin.errors import (
    AdapterFilesError,
    ExportError,
    ForbiddenAgentError,
    MetaclawError,
    StoreError,
    TrainerRefusedError,
    TrainerUnavailableError,
    TrainingNotStartedError,
    UnknownAgentError,
    UnknownSessionError,
    UnknownTraceError,
    UnknownVersionError,
    VersionStateError,
)
from metaclaw_plugin.gateway.dialects import error_body

logger = logging.getLogger(__name__)

_STATUS = {
    ForbiddenAgentError: 403,
    UnknownAgentError: 404,
    UnknownSessionError: 404,
    UnknownTraceError: 404,
    UnknownVersionError: 404,
    VersionStateError: 409,
    TrainingNotStartedError: 409,
    TrainerRefusedError: 409,
    StoreError: 503,
    TrainerUnavailableError: 503,
    AdapterFilesError: 503,
    ExportError: 503,
}
_STORE_IS_AWAY = (OperationalError, InterfaceError, PoolTimeoutError, TimeoutError)


class OwnRoute(APIRoute):
    """Turns our errors and FastAPI's into the error body that clients of the gateway know."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await inner(request)
            except RequestValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                return _error(400, f"{where}: {first['msg']}")
            except HTTPException as error:
                return _error(error.status_code, str(error.detail))
            except MetaclawError as error:
                for kind, status in _STATUS.items():
                    if isinstance(error, kind):
                        return _error(status, str(error))
                return _own_fault(request)
            except _STORE_IS_AWAY:
                return _error(503, "the store does not answer; try again")
            except SQLAlchemyError:
                return _own_fault(request)

        return handle


def _own_fault(request: Request) -> JSONResponse:
    """What nobody foresaw, told from what is only away for a while: it is to be mended, not to be tried again."""
    logger.exception("%s %s failed", request.method, request.scope["path"][:200])
    return _error(500, "the gateway failed over this request, by a fault of its own; its log says how")


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(error_body("chat", status, message), status_code=status)
