"""The routes, and their errors in one format."""

import contextlib
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from nanohybrid.errors import NanohybridError
from nanohybrid.serve.chat import chat
from nanohybrid.serve.completions import complete
from nanohybrid.serve.errors import ApiError, unexpected, validation_error
from nanohybrid.serve.middleware import ApiKeys, RequestGuard
from nanohybrid.serve.responses import ResponseRequest, respond
from nanohybrid.serve.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from nanohybrid.serve.service import Service
from nanohybrid.serve.sse import ClientDisconnected
from nanohybrid.version import VERSION

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # noqa: E501

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "a field is wrong, too large, or contradicts another: `error.param` names it"},
    401: {"description": "no key, or a wrong one"},
    403: {"description": "asked by a page of another site"},
    404: {"description": "no such model or route"},
    408: {"description": "the body did not arrive in time"},
    413: {"description": "the body is too large"},
    415: {"description": "the body is not application/json"},
    429: {"description": "the queue is full; `retry-after` says when to try again"},
    431: {"description": "the headers are too large"},
    503: {"description": "the engine has failed, or the server is not ready"},
    504: {"description": "the request took too long"},
}


def application(service: Service) -> FastAPI:
    """The server as an ASGI application; its lifespan runs the engine's thread."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.loop.start()
        yield
        await service.loop.stop()
        service.close()

    app = FastAPI(
        title="nanohybrid",
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=REFUSALS,
    )
    app.state.service = service
    _errors(app, service)
    _generation(app, service)
    _about(app, service)
    for operations in app.openapi()["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's status for invalid fields; here it is 400
    app.add_middleware(
        RequestGuard,
        limits=service.limits,
        keys=ApiKeys(service.settings.api_keys),
        refused=service.metrics.refuse,
    )
    return app


def _generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", tags=["generate"])
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await chat(service, body, request)

    @app.post("/v1/completions", tags=["generate"])
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await complete(service, body, request)

    @app.post("/v1/responses", tags=["generate"])
    async def responses(body: ResponseRequest, request: Request) -> Response:
        return await respond(service, body, request)

    @app.post("/tokenize", tags=["text"])
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        service.check_model(body.model)
        ids = await service.run_in_worker(lambda: _tokens(service, body))
        return {"tokens": ids, "count": len(ids), "max_model_len": service.context}

    @app.post("/detokenize", tags=["text"])
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        service.check_model(body.model)
        text = await service.run_in_worker(
            lambda: service.llm.tokenizer.decode(body.tokens, skip_special_tokens=False)
        )
        return {"prompt": text}


def _about(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["about"])
    async def models() -> dict[str, Any]:
        entry = {
            "id": service.settings.model_name,
            "object": "model",
            "created": service.began,
            "owned_by": "nanohybrid",
            "max_model_len": service.context,
        }
        return {"object": "list", "data": [entry]}

    @app.get("/health", tags=["about"])
    async def health() -> Response:
        """200 while the engine works."""
        service.loop.check()
        return JSONResponse({"status": "ok"})

    @app.get("/ready", tags=["about"])
    async def ready() -> Response:
        """200 while new requests are taken: not before the start, not while draining."""
        return JSONResponse(
            {"status": "ready"} if service.loop.ready else {"status": "not ready"},
            200 if service.loop.ready else 503,
        )

    @app.get("/metrics", tags=["about"])
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    _page(app, "/", "index.html")
    _page(app, "/docs", "docs.html")


def _page(app: FastAPI, path: str, file: str) -> None:
    text = resources.files("nanohybrid.serve").joinpath("page", file).read_text(encoding="utf-8")

    @app.get(path, include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(
            text, headers={"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
        )


def _errors(app: FastAPI, service: Service) -> None:
    def shown(error: ApiError) -> Response:
        service.metrics.refuse(error.status)
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(ApiError)
    async def ours(_: Request, error: ApiError) -> Response:
        return shown(error)

    @app.exception_handler(NanohybridError)
    async def invalid_input(_: Request, error: NanohybridError) -> Response:
        return shown(ApiError(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return shown(validation_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return shown(ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        """A bug in the server. Its traceback is in the log; the client gets an error in the usual format."""
        return shown(unexpected(error))

    @app.exception_handler(ClientDisconnected)
    async def left(_: Request, error: ClientDisconnected) -> Response:
        return _Nothing()


class _Nothing(Response):
    """The response to a client that has disconnected."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(OSError):
            await send({"type": "http.response.start", "status": 499, "headers": []})
            await send({"type": "http.response.body", "body": b""})


def _tokens(service: Service, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        thinking = body.chat_template_kwargs.enable_thinking if body.chat_template_kwargs else None
        return service.encode_conversation(body.messages, body.tools, thinking)
    text = body.prompt if body.prompt is not None else body.content or ""
    return service.llm.encode(text) if body.add_special_tokens else service.llm.tokenizer.encode(text)
