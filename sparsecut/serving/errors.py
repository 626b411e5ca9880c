"""The error that a route answers with."""

from __future__ import annotations

from .responses import build_error


class APIError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: The HTTP status.
        kind: OpenAI's type of the error.
        code: OpenAI's code of the error.
        param: The setting of the request that is wrong, where it is one.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param

    def build_content(self) -> dict:
        """The error as OpenAI's clients read it."""
        return build_error(str(self), self.kind, self.code, self.param)


def build_busy_error(message: str) -> APIError:
    """The error for a request that finds no place."""
    return APIError(429, message, "rate_limit_error", "queue_full")
