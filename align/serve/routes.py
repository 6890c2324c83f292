"""OpenAI's API: models, chat completions and completions; loading of adapters as vLLM has it; health and metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import APIRouter
from fastapi import Request as Http
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from align.core.errors import InputError, readable
from align.rollout.detokenize import StopFinder, TextDecoder
from align.rollout.requests import Request, SamplingParams
from align.serve.answer_constraints import GrammarFor, grammars_for
from align.serve.answers import Answers, ChatAnswers, TextAnswers
from align.serve.errors import Refusal, invalid, unknown_model
from align.serve.model_names import Chosen, Named, UnknownModel
from align.serve.prompts import ChatFormat, Prompt, chat_prompt, completion_prompts, samplings
from align.serve.rate_limits import Charge
from align.serve.rewards import Rewards, reward_prompts
from align.serve.schemas import ChatBody, CompletionBody, ErrorBody, LoadAdapter, RewardBody, Sampled, UnloadAdapter
from align.serve.service import Call, EventStream, Service, refusing, respond_whole
from align.serve.tenants import Tenant

log = logging.getLogger(__name__)
T = TypeVar("T")
SAFE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")
"""Characters of an arm's label that stand in a header as they are; others are percent-encoded."""
NEEDS_ADMIN = "This needs the key of an administrator."
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request asks for what cannot be done, or its body cannot be read."},
    401: {"description": "There is no key, or one that is not known."},
    403: {"description": "The key does not allow it."},
    404: {"description": "There is no such model, adapter, tenant or address."},
    413: {"description": "The body is too large."},
    421: {"description": "The server is known by another name."},
    422: {"description": "The model came to values that are not finite."},
    429: {"description": "A limit, a budget or the queue is used up for now."},
    500: {"description": "The server made an error, which its log has."},
    503: {"description": "The server is shutting down, or cannot count what is used."},
}
for _response in ERRORS.values():
    _response["model"] = ErrorBody
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""The other form of an answer."""


def listing(service: Service) -> APIRouter:
    """What somebody may ask for, and what they have used."""
    router = APIRouter(responses=ERRORS)

    @router.get("/v1/models")
    async def models(http: Http) -> Any:
        named = service.portfolio.names(tenant_of(http).allowed)
        return {"object": "list", "data": [card(service, name) for name in named]}

    @router.get("/v1/models/{model:path}")
    async def model(http: Http, model: str) -> Any:
        named = service.portfolio.names(tenant_of(http).allowed)
        found = next((name for name in named if name.name == model), None)
        if found is None:
            raise unknown_model(model)
        return card(service, found)

    @router.get("/v1/usage")
    async def usage(http: Http, tenant: str | None = None) -> Any:
        asks, keys, counted = tenant_of(http), service.keys, service.limiter.usage
        if keys is None or counted is None:
            raise Refusal(404, "This server has no key file, and counts nobody's usage.", code="not_found")
        of = asks if tenant in (None, asks.name) else keys.tenants.get(tenant or "")
        if of is not asks and not asks.admin:
            raise Refusal(403, NEEDS_ADMIN, param="tenant", code="insufficient_permissions")
        if of is None:
            raise Refusal(404, "There is no such tenant.", param="tenant", code="not_found")
        with refusing():
            return await run_in_threadpool(service.limiter.as_json, of, counted)

    return router


def api(service: Service) -> APIRouter:
    """What a client of a model asks for."""
    router = APIRouter(responses=ERRORS)

    @router.post("/v1/chat/completions", responses=STREAMED)
    async def chat(http: Http, body: ChatBody) -> Response:
        body.refuse_unsupported({"echo": ((False,), "is not supported here: use /v1/completions")})
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs", "It needs logprobs=true.")
        least = 1 + body.n * (body.most_tokens or 1)
        with chosen_for(service, http, body, False) as chosen, let_in(service, http, body.n, least) as (call, charge):

            def read_chat() -> tuple[ChatFormat, Prompt, GrammarFor | None]:
                form = service.format_of(chosen.version)
                return form, chat_prompt(form, body), grammar_for(form, body, service)

            form, prompt, grammar = await read(service, call, read_chat)
            logprobs = body.top_logprobs if body.logprobs else None
            with refusing():
                left = charge.room(len(prompt.ids), body.n) if body.most_tokens is None else None
            if logprobs is not None and body.most_tokens is None:
                fits = max(1, service.max_logprobs // (body.n * (logprobs + 1)))
                left = min(fits, left or fits)
            drawn = samplings(form, body, prompt, body.most_tokens, service.context, logprobs, left=left)
            refuse_many_logprobs(service, "top_logprobs", logprobs, 0, sum(each.max_tokens for each in drawn))
            requests = requests_for(form, body, chosen, call.tenant, prompt, drawn, grammar)
            answers = ChatAnswers(
                form,
                prompt,
                call.record,
                body.n,
                body.stops,
                tools=[tool.function.name for tool in body.tools] if body.tool_choice != "none" else [],
                most_calls=None if body.parallel_tool_calls else 1,
                logprobs=body.logprobs,
                usage=body.stream_options.include_usage,
            )
            return await answered(call, http, requests, len(prompt.ids), answers, body)

    @router.post("/v1/completions", responses=STREAMED)
    async def completions(http: Http, body: CompletionBody) -> Response:
        body.refuse_unsupported({"tools": (([],), "is not supported here: use /v1/chat/completions")})
        refuse_many_prompts(service, "prompt", len(body.prompts))
        number = len(body.prompts) * body.n
        least = len(body.prompts) + number * body.max_tokens
        with chosen_for(service, http, body, False) as chosen, let_in(service, http, number, least) as (call, _):

            def read_completion() -> tuple[ChatFormat, list[Prompt], GrammarFor | None]:
                form = service.format_of(chosen.version)
                return form, completion_prompts(form, body, service.vocabulary), grammar_for(form, body, service)

            form, prompts, grammar = await read(service, call, read_completion)
            echoed, requests = body.logprobs if body.echo else None, list[Request]()
            prompt_tokens = sum(len(prompt.ids) for prompt in prompts) * body.n if body.echo else 0
            refuse_many_logprobs(service, "logprobs", body.logprobs, prompt_tokens, number * body.max_tokens)
            for prompt in prompts:
                drawn = samplings(form, body, prompt, body.max_tokens, service.context, body.logprobs, echoed)
                requests += requests_for(form, body, chosen, call.tenant, prompt, drawn, grammar)
            answers = TextAnswers(
                form, prompts, http.scope["record"], body.n, body.stops, body.echo, body.logprobs,
                body.stream_options.include_usage,
            )  # fmt: skip
            return await answered(call, http, requests, sum(len(prompt.ids) for prompt in prompts), answers, body)

    @router.post("/v1/rewards")
    async def rewards(http: Http, body: RewardBody) -> Response:
        number = len(body.conversations)
        refuse_many_prompts(service, "messages", number)
        with chosen_for(service, http, body, True) as chosen, let_in(service, http, number, number) as (call, _):
            version = chosen.version
            assert version is not None
            prompts = await read(
                service, call, lambda: reward_prompts(service.format_of(version), body, version.alone, service.context)
            )
            asked, tenant = SamplingParams(0), call.tenant.name
            requests = [Request(prompt.ids, asked, version.digest, tenant, scored=True) for prompt in prompts]
            answers = Rewards(http.scope["record"], prompts)
            return await answered(call, http, requests, sum(len(prompt.ids) for prompt in prompts), answers)

    return router


@contextmanager
def chosen_for(service: Service, http: Http, body: Sampled | RewardBody, scores: bool) -> Iterator[Chosen]:
    """The weights that a request asks for, see `Service.chosen`.

    Args:
        scores: it asks a reward model.

    Raises:
        Refusal: there are none such for them; or they give scores where answers are wanted, or the other way.
    """
    with service.chosen(http.scope["record"], tenant_of(http), body.model, body.user) as chosen:
        rewards = chosen.version is not None and chosen.version.scores
        if rewards and not scores:
            raise invalid("model", f"'{chosen.name}' is a reward model: ask it by /v1/rewards.")
        if scores and not rewards:
            raise invalid("model", f"'{chosen.name}' is no reward model.")
        yield chosen


@contextmanager
def let_in(service: Service, http: Http, answers: int, least: int) -> Iterator[tuple[Call, Charge]]:
    """A call of whoever asks, see `Call.let_in`: before their prompt is tokenised, which a flood would have done."""
    call = Call(service, http.scope["record"], http.scope["watch"], tenant_of(http))
    with call.let_in(answers, least) as charge:
        yield call, charge


def refuse_many_prompts(service: Service, param: str, prompts: int) -> None:
    """Raises: Refusal: a request has more prompts than one may have."""
    most = service.max_prompts
    if prompts > most:
        message = f"The request has {prompts} prompts, and may have {most} (stage.max_prompts). Send several requests."
        raise invalid(param, message, "too_many_prompts")


def refuse_many_logprobs(
    service: Service, param: str, logprobs: int | None, prompt_tokens: int, answer_tokens: int
) -> None:
    """Refuse an answer that would have too many logprobs, before anything of it is computed.

    Args:
        logprobs: likeliest tokens that are asked for at each place; None for no logprobs.
        prompt_tokens: of the prompts that are echoed, once for each answer.
        answer_tokens: that all answers may have.

    Raises:
        Refusal: it would.
    """
    tokens, most = prompt_tokens + answer_tokens, service.max_logprobs
    if logprobs is not None and tokens * (logprobs + 1) > most:
        message = (
            f"{tokens} tokens with {logprobs} logprobs and their own make {tokens * (logprobs + 1):,} logprobs, and an "
            f"answer may have {most:,} (stage.max_logprobs). Ask for fewer tokens, prompts or logprobs."
        )
        raise invalid(param, message, "too_many_logprobs")


async def read(service: Service, call: Call, work: Callable[[], T]) -> T:
    """Do what takes time of a request, in another thread, when it is its tenant's turn. It is done at one go: each way
    to another thread and back waits for the engine's."""
    async with service.readers.turn(call.tenant.name):
        return await run_in_threadpool(work)


def grammar_for(form: ChatFormat, body: Sampled, service: Service) -> GrammarFor | None:
    return grammars_for(form, body, service.vocabulary) if body.constrains else None


def percent_encode(label: str) -> str:
    return quote(label, safe=SAFE)


def tenant_of(http: Http) -> Tenant:
    return http.scope["tenant"]


def requests_for(
    form: ChatFormat,
    body: Sampled,
    chosen: Chosen,
    tenant: Tenant,
    prompt: Prompt,
    samplings: Sequence[SamplingParams],
    grammar: GrammarFor | None,
) -> list[Request]:
    """Return what the engine is asked: one answer each."""
    before = () if isinstance(body, ChatBody) else prompt.ids
    return [
        Request(
            prompt.ids,
            sampling,
            chosen.version.digest if chosen.version else None,
            tenant.name,
            grammar=None if grammar is None else grammar(prompt, sampling.max_tokens),
            ends=StopFinder(TextDecoder(form.tokenizer, body.stops, before)) if body.stops else None,
        )
        for sampling in samplings
    ]


async def answered(
    call: Call, http: Http, requests: Sequence[Request], prompt_tokens: int, answers: Answers,
    body: Sampled | None = None,
) -> Response:  # fmt: skip
    """The response to a request that was understood.

    Args:
        body: says whether it is a stream; None where it is none.
    """
    record = call.record
    record.stream = body is not None and body.stream
    call.begin(requests, prompt_tokens)
    arm = percent_encode(record.arm)
    headers = {"x-align-base": record.base, "x-align-adapter": record.adapter, "x-align-arm": arm}
    headers = {name: value for name, value in headers.items() if value}
    if body is not None and body.stream:
        return EventStream(call, answers, body.stream_options.include_usage, headers)
    return await respond_whole(call, answers, http.receive, headers)


def card(service: Service, named: Named) -> dict[str, Any]:
    """A model as vLLM lists it; and the digests of what it stands for."""
    base = service.portfolio.base.digest
    arms = [
        {"arm": arm.label, "weight": arm.weight, "adapter": arm.version.digest if arm.version else None}
        for arm in named.arms
    ]
    return {
        "id": named.name, "object": "model", "created": service.created, "owned_by": "align", "root": named.name,
        "parent": named.parent, "max_model_len": service.context, "base": base,
        "scores": any(arm.version is not None and arm.version.scores for arm in named.arms),
        "adapter": arms[0]["adapter"] if len(arms) == 1 else None, "arms": arms if len(arms) > 1 else None,
    }  # fmt: skip


def administration(service: Service) -> APIRouter:
    """What those who run the server ask for."""
    router = APIRouter(responses=ERRORS)

    @router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def load(http: Http, body: LoadAdapter) -> Response:
        require_admin(http)
        if not service.portfolio.roots:
            message = "This server loads no adapters while it runs. Start it with stage.roots=[FOLDER]."
            raise Refusal(403, message, param="lora_path", code="loading_disabled")
        who, record = tenant_of(http).name, http.scope["record"]
        record.asked = readable(body.lora_name)
        try:
            version = await run_in_threadpool(service.load, body.lora_name, body.lora_path, body.load_inplace, who)
        except InputError as error:
            message = f"'{body.lora_name}' was not loaded. {error.field}: {error.problem}. {error.remedy}"
            raise invalid(error.field, message) from error
        except Refusal:
            raise
        except Exception as error:  # what a wrong value in adapter_config.json leads to has any type
            log.warning("'%s' was not loaded", body.lora_name, exc_info=error)
            message = (
                f"'{body.lora_name}' was not loaded: its files cannot be read as an adapter ({type(error).__name__})."
            )
            raise invalid("lora_path", message) from error
        record.base, record.adapter = version.base, version.digest
        done = f"Success: LoRA adapter '{body.lora_name}' added successfully."
        return PlainTextResponse(done, headers={"x-align-adapter": version.digest})

    @router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload(http: Http, body: UnloadAdapter) -> Response:
        require_admin(http)
        http.scope["record"].asked = readable(body.lora_name)
        try:
            await run_in_threadpool(service.unload, body.lora_name, tenant_of(http).name)
        except UnknownModel as error:
            raise Refusal(
                404, f"The lora adapter '{body.lora_name}' cannot be found.", param="lora_name", code="not_found"
            ) from error
        except InputError as error:
            raise invalid(error.field, f"'{body.lora_name}' {error.problem}. {error.remedy}") from error
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @router.get("/health")
    async def health() -> Response:
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    @router.get("/ready")
    async def ready() -> Response:
        status = "ready" if service.ready else "draining" if service.engine.alive else "the engine has stopped"
        return JSONResponse({"status": status}, 200 if service.ready else 503)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics(http: Http) -> Response:
        require_admin(http)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def require_admin(http: Http) -> None:
    if not tenant_of(http).admin:
        raise Refusal(403, NEEDS_ADMIN, code="insufficient_permissions")
