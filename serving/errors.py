"""What went wrong, in the form that OpenAI's clients read.

ApiError(404, "there is no model 'x'; there is full_sft_512", code="model_not_found", param="model")
-> status 404, {"error": {"message": "there is ...", "type": "invalid_request_error", "param": "model",
                          "code": "model_not_found"}}
"""

from collections.abc import Mapping

from fastapi.responses import JSONResponse
from pydantic import BaseModel

TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Of every answer whose status is 400 or more."""

    error: ErrorDetail


class ApiError(Exception):
    """Ends a request with a status and an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self) -> dict[str, object]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        # a lone surrogate that was sent cannot be sent back
        message = self.message.encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)
