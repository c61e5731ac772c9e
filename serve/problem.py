"""Why a request is not answered, in one form for all of the server (RFC 9457)."""

from __future__ import annotations

from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse


class Problem(Exception):  # noqa: N818  (the name of what is sent: RFC 9457)
    """Why a request is not answered, in words for the client."""

    def __init__(self, status: HTTPStatus, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def problem_response(problem: Problem, request_id: str) -> JSONResponse:
    """A problem as ``application/problem+json`` (RFC 9457)."""
    content = {
        "status": problem.status.value,
        "title": problem.status.phrase,
        "detail": str(problem),
        "request_id": request_id,
    }
    return JSONResponse(content, problem.status, problem.headers, "application/problem+json")


def to_problem(error: HTTPException) -> Problem:
    """A problem from an error of Starlette's."""
    return Problem(HTTPStatus(error.status_code), str(error.detail), **dict(error.headers or {}))
