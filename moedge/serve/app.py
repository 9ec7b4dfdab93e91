"""The endpoints. Knows HTTP and the service; how answers are computed or formatted is elsewhere."""

import base64
import contextlib
import hashlib
import re
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from moedge.api.errors import ApiError, documented, install
from moedge.api.keys import RequireKey
from moedge.api.limits import AT_END, BodyLimits, Limits
from moedge.api.responses import (
    ChatCompletion,
    Completion,
    Embedding,
    EmbeddingList,
    EmbeddingUsage,
    ModelAbility,
    ModelCard,
    ModelList,
    Tokens,
    Usage,
)
from moedge.api.stream import event_stream
from moedge.api.types import ChatRequest, CompletionRequest, EmbeddingRequest, SamplingBody, TokenizeRequest
from moedge.runtime.generate import Prompt
from moedge.runtime.session import context_of
from moedge.serve.formats import ChatFormat, CompletionFormat, Format
from moedge.serve.service import Answers, Service, Work
from moedge.serve.work import Accepted, Piece, answering, embedding, new_session, tokenising

PAGE = Path(__file__).with_name("page.html")
OPEN = ("/", "/health")  # without a key
FAILURES = documented(400, 401, 404, 408, 413, 429, 503, 504)


@dataclass(frozen=True)
class Access:
    """Who may ask, and how much at once. `keys`: name to hash, none means anybody. `origins`: web pages' (CORS).

    `hosts`: names under which the server may be called, none means any. A web page can give this machine a name of its
    own and be let in as the same origin: that name is refused here.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    origins: Sequence[str] = ()
    hosts: Sequence[str] = ()
    bodies: BodyLimits = field(default_factory=BodyLimits)


def make_app(service: Service, access: Access | None = None) -> FastAPI:
    """The application that serves one model."""
    access = access or Access()
    app = FastAPI(
        title="moedge",
        version=version("moedge"),
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
    )
    install(app)
    app.add_middleware(Limits, limits=access.bodies)
    if access.keys:
        app.add_middleware(RequireKey, keys=access.keys, open_paths=OPEN)
    if access.hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(access.hosts), www_redirect=False)
    if access.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(access.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    _add_answers(app, service)
    _add_model(app, service)
    _add_state(app, service)
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", response_model=Completion, responses=FAILURES)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue a text."""
        settings = body.settings() | {"logprobs": body.logprobs}
        answer_format = CompletionFormat(service.name, body.include_usage)
        max_tokens = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default
        return await _answer(request, service, body, body.prompts, max_tokens, settings, answer_format)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=FAILURES)
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Continue a conversation, by the model's chat template. Without max_tokens up to the context's end."""
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        settings = body.settings() | {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
        messages = [message.plain() for message in body.messages]
        answer_format = ChatFormat(service.name, body.include_usage)
        max_tokens = body.max_completion_tokens or body.max_tokens
        return await _answer(request, service, body, [messages], max_tokens, settings, answer_format)


async def _answer(
    request: Request,
    service: Service,
    body: SamplingBody,
    prompts: Sequence[Prompt],
    max_tokens: int | None,
    settings: dict[str, Any],
    answer_format: Format,
) -> Response:
    """`n` answers to each prompt, streamed or whole."""
    lm, n = service.lm, body.n or 1
    service.check_model(body.model)
    if len(prompts) * n > service.engine.parallel:
        raise ApiError(
            400,
            f"{len(prompts)} prompts with n {n} are {len(prompts) * n} answers at once, the server has room for "
            f"{service.engine.parallel}: ask for fewer, or start it with a larger --parallel",
            param="n" if n > 1 else "prompt",
        )
    works: list[Work] = []
    for prompt in prompts:
        for choice in range(n):
            session = new_session(lm)
            own = settings if body.seed is None else settings | {"seed": (body.seed + choice) % 2**63}
            work = answering(lm, session, prompt, max_tokens, own)
            works.append((work, lambda session=session: len(session.ids) if session else 0))  # type: ignore[misc]
    answers = _answers(request, service, works)
    collected = _Collected(answers, n)
    if body.stream:
        await collected.begin()
        return event_stream(_chunks(collected, answer_format, body.include_usage))
    async for index, piece in collected:
        collected.pieces[index].append(piece)
    return Response(answer_format.whole(collected.pieces, collected.usage), media_type="application/json")


def _answers(request: Request, service: Service, works: Sequence[Work], brief: bool = False) -> Answers:
    """The request's answers, which end with it, however it ends."""
    answers = Answers(service, works, brief)
    stack: contextlib.ExitStack = request.scope[AT_END]
    stack.callback(answers.close)
    return answers


class _Collected:
    """The pieces of a request's answers as they come, and the tokens counted."""

    def __init__(self, answers: Answers, n: int) -> None:
        self._answers, self._n = answers, n
        self._prompt = self._completion = 0
        self._first: tuple[int, Piece] | None = None
        self.pieces: list[list[Piece]] = [[] for _ in range(answers.count)]

    async def begin(self) -> None:
        """Wait for the first piece, so that what is wrong with a request is told by the response's status."""
        self._first = await anext(self)

    def __aiter__(self) -> "_Collected":
        return self

    async def __anext__(self) -> tuple[int, Piece]:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        async for index, event in self._answers:
            if isinstance(event, Accepted):
                self._prompt += event.tokens if index % self._n == 0 else 0
            else:
                self._completion += 1
                return index, event
        raise StopAsyncIteration

    @property
    def usage(self) -> Usage:
        return Usage.of(self._prompt, self._completion)


async def _chunks(collected: _Collected, answer_format: Format, include_usage: bool) -> AsyncIterator[str]:
    opened = set()
    async for index, piece in collected:
        if index not in opened:
            opened.add(index)
            if opening := answer_format.opening(index):
                yield opening
        if chunk := answer_format.chunk(index, piece):
            yield chunk
    if include_usage:
        yield answer_format.closing(collected.usage)


def _add_model(app: FastAPI, service: Service) -> None:
    def card() -> ModelCard:
        context, engine = context_of(service.lm), service.engine
        ability = ModelAbility(chat=service.chat, context=context, parallel=engine.parallel)
        return ModelCard(id=service.name, created=service.created, moedge=ability)

    @app.get("/v1/models", responses=documented(401, 503))
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[card()])

    @app.get("/v1/models/{name:path}", responses=documented(401, 404, 503))
    async def model(name: str) -> ModelCard:
        """One model by its id."""
        service.check_model(name)
        return card()

    @app.post("/v1/embeddings", responses=FAILURES)
    async def embeddings(request: Request, body: EmbeddingRequest) -> EmbeddingList:
        """The mean over all tokens of the model's last hidden states, not normalised; no model is trained for it."""
        lm, vectors, tokens = service.lm, [], 0
        service.check_model(body.model)
        session = new_session(lm)
        works = [(embedding(lm, session, body.inputs), lambda: len(session.ids) if session else 0)]
        async for _, event in _answers(request, service, works):
            if isinstance(event, Accepted):
                tokens = event.tokens
            else:
                vectors = event
        data = [
            Embedding(index=index, embedding=_base64(vector) if body.encoding_format == "base64" else vector)
            for index, vector in enumerate(vectors)
        ]
        usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
        return EmbeddingList(data=data, model=service.name, usage=usage)

    @app.post("/tokenize", responses=FAILURES)
    async def tokenize(request: Request, body: TokenizeRequest) -> Tokens:
        """The token ids of `prompt`, or of `messages` as a chat would put them."""
        lm = service.lm
        if body.model is not None:
            service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give prompt or messages, one of the two", param="prompt")
        prompt: Prompt = [m.plain() for m in body.messages] if body.messages else body.prompt or ""
        answers = _answers(request, service, [(tokenising(lm, prompt), lambda: 0)], brief=True)
        [(_, ids)] = [event async for event in answers]  # to the end: what is left before it counts as aborted
        return Tokens(tokens=ids, count=len(ids), max_model_len=context_of(lm))


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses={503: {"description": "The model is loading."}})
    async def health() -> Response:
        """200 when the model answers, 503 while it is loading."""
        try:
            ready = service.lm is not None
        except ApiError:
            ready = False
        return JSONResponse({"status": "ok" if ready else "loading"}, 200 if ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse, responses=documented(401, 503))
    async def metrics() -> Response:
        """For Prometheus."""
        return PlainTextResponse(service.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/cache", responses=documented(401, 503))
    async def cache() -> Response:
        """Which experts are in memory, and which the last step used and had to read, layer by layer."""
        return JSONResponse(service.cache())

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        text = PAGE.read_text(encoding="utf-8")
        return HTMLResponse(text, headers={**PAGE_HEADERS, "content-security-policy": _policy(text)})


PAGE_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-cache"}


def _policy(page: str) -> str:
    """Nothing but the page's own script and style, and this server."""
    scripts, styles = (" ".join(_hashes(page, tag)) or "'none'" for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(page: str, tag: str) -> list[str]:
    bodies = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in bodies]
