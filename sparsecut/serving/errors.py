"""The error that a route answers with."""

from __future__ import annotations


class APIError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: The HTTP status.
        kind: OpenAI's type of the error.
        code: OpenAI's code of the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code


def build_busy_error(message: str) -> APIError:
    """The error for a request that finds no place."""
    return APIError(429, message, "rate_limit_error", "queue_full")
