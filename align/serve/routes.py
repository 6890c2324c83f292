"""OpenAI's API: models, chat completions and completions; loading of adapters as vLLM has it; health and metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi import Request as Http
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from align.errors import InputError
from align.rollout.requests import Grammar, Request, SamplingParams
from align.serve.adapter_folders import Version
from align.serve.answers import Answers, ChatAnswers, TextAnswers
from align.serve.constraints import constrained
from align.serve.decoding import StopFinder, TextDecoder
from align.serve.formats import ChatFormat, Prompt, chat_prompt, completion_prompts, samplings
from align.serve.identity import Chosen, Named, UnknownModel
from align.serve.refusals import Refusal, invalid, unknown_model
from align.serve.rewards import Rewards, reward_prompts
from align.serve.schemas import ChatBody, CompletionBody, LoadAdapter, RewardBody, Sampled, UnloadAdapter
from align.serve.service import Call, Service
from align.serve.streams import EventStream, whole
from align.serve.tenants import Tenant

log = logging.getLogger(__name__)
GrammarFor = Callable[[Prompt, int], Grammar | None]
"""Of a prompt and the tokens that its answer may have: what the answer has to follow."""


def listing(service: Service) -> APIRouter:
    """The models that somebody may ask for."""
    router = APIRouter()

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

    return router


def api(service: Service) -> APIRouter:
    """What a client of a model asks for."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(http: Http, body: ChatBody) -> Response:
        body.refuse_unsupported({"echo": ((False,), "is not supported here: use /v1/completions")})
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs", "It needs logprobs=true.")
        with service.chosen(http.scope["record"], tenant_of(http), body.model, body.user) as chosen:
            require_scores(chosen, False)
            form, prompt, grammar = await run_in_threadpool(read_chat, service, chosen, body)
            logprobs = body.top_logprobs if body.logprobs else None
            drawn = samplings(form, body, prompt, body.most_tokens, service.context, logprobs)
            requests = requests_for(form, body, chosen, tenant_of(http), prompt, drawn, grammar)
            answers = chat_answers(http, form, body, prompt)
            return await answered(service, http, requests, len(prompt.ids), answers, body)

    @router.post("/v1/completions")
    async def completions(http: Http, body: CompletionBody) -> Response:
        body.refuse_unsupported({"tools": (([],), "is not supported here: use /v1/chat/completions")})
        with service.chosen(http.scope["record"], tenant_of(http), body.model, body.user) as chosen:
            require_scores(chosen, False)
            form, prompts, grammar = await run_in_threadpool(read_completion, service, chosen, body)
            echoed, requests = body.logprobs if body.echo else None, list[Request]()
            for prompt in prompts:
                drawn = samplings(form, body, prompt, body.max_tokens, service.context, body.logprobs, echoed)
                requests += requests_for(form, body, chosen, tenant_of(http), prompt, drawn, grammar)
            answers = TextAnswers(
                form, prompts, http.scope["record"], body.n, body.stops, body.echo, body.logprobs,
                body.stream_options.include_usage,
            )  # fmt: skip
            return await answered(service, http, requests, sum(len(prompt.ids) for prompt in prompts), answers, body)

    @router.post("/v1/rewards")
    async def rewards(http: Http, body: RewardBody) -> Response:
        with service.chosen(http.scope["record"], tenant_of(http), body.model, body.user) as chosen:
            version = require_scores(chosen, True)
            assert version is not None
            prompts = await run_in_threadpool(
                lambda: reward_prompts(service.format_of(version), body, version.alone, service.context)
            )
            asked, tenant = SamplingParams(0), tenant_of(http).name
            requests = [Request(prompt.ids, asked, version.digest, tenant, scored=True) for prompt in prompts]
            answers = Rewards(http.scope["record"], prompts)
            return await answered(service, http, requests, sum(len(prompt.ids) for prompt in prompts), answers)

    return router


def read_chat(service: Service, chosen: Chosen, body: ChatBody) -> tuple[ChatFormat, Prompt, GrammarFor]:
    """What takes time of a request, at one go: each way to another thread and back waits for the engine's."""
    form = service.format_of(chosen.version)
    return form, chat_prompt(form, body), constrained(form, body, service.vocabulary)


def read_completion(
    service: Service, chosen: Chosen, body: CompletionBody
) -> tuple[ChatFormat, list[Prompt], GrammarFor]:
    form = service.format_of(chosen.version)
    return form, completion_prompts(form, body, service.vocabulary), constrained(form, body, service.vocabulary)


def require_scores(chosen: Chosen, wanted: bool) -> Version | None:
    """The weights that were chosen. Raises: Refusal: they give scores where answers are wanted, or the other way."""
    scores = chosen.version is not None and chosen.version.scores
    if scores and not wanted:
        raise invalid("model", f"'{chosen.name}' is a reward model: ask it by /v1/rewards.")
    if wanted and not scores:
        raise invalid("model", f"'{chosen.name}' is no reward model.")
    return chosen.version


def tenant_of(http: Http) -> Tenant:
    return http.scope["tenant"]


def chat_answers(http: Http, form: ChatFormat, body: ChatBody, prompt: Prompt) -> ChatAnswers:
    tools = [tool.function.name for tool in body.tools] if body.tool_choice != "none" else []
    return ChatAnswers(
        form, prompt, http.scope["record"], body.n, body.stops, tools, None if body.parallel_tool_calls else 1,
        body.logprobs, body.stream_options.include_usage,
    )  # fmt: skip


def requests_for(
    form: ChatFormat, body: Sampled, chosen: Chosen, tenant: Tenant, prompt: Prompt, drawn: Sequence[SamplingParams],
    grammar: GrammarFor,
) -> list[Request]:  # fmt: skip
    """What the engine is asked: one answer each."""
    adapter = chosen.version.digest if chosen.version else None
    before = () if isinstance(body, ChatBody) else prompt.ids

    def ends() -> StopFinder | None:
        return StopFinder(TextDecoder(form.tokenizer, body.stops, before)) if body.stops else None

    return [
        Request(prompt.ids, sampling, adapter, tenant.name, grammar=grammar(prompt, sampling.max_tokens), ends=ends())
        for sampling in drawn
    ]


async def answered(
    service: Service, http: Http, requests: Sequence[Request], prompt_tokens: int, answers: Answers,
    body: Sampled | None = None,
) -> Response:  # fmt: skip
    """The response to a request that was understood.

    Args:
        body: says whether it is a stream; None where it is none.
    """
    record = http.scope["record"]
    record.stream = body is not None and body.stream
    call = Call(service, record, http.scope["watch"])
    call.begin(tenant_of(http), requests, prompt_tokens)
    headers = {"x-align-base": record.base, "x-align-adapter": record.adapter, "x-align-arm": record.arm}
    headers = {name: value for name, value in headers.items() if value}
    if body is not None and body.stream:
        return EventStream(call, answers, body.stream_options.include_usage, headers)
    return await whole(call, answers, http.receive, headers)


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
    router = APIRouter()

    @router.post("/v1/load_lora_adapter")
    async def load(http: Http, body: LoadAdapter) -> Response:
        require_admin(http)
        try:
            version = await run_in_threadpool(service.load, body.lora_name, body.lora_path, body.load_inplace)
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
        record = http.scope["record"]
        record.asked, record.base, record.adapter = body.lora_name, version.base, version.digest
        done = f"Success: LoRA adapter '{body.lora_name}' added successfully."
        return PlainTextResponse(done, headers={"x-align-adapter": version.digest})

    @router.post("/v1/unload_lora_adapter")
    async def unload(http: Http, body: UnloadAdapter) -> Response:
        require_admin(http)
        try:
            await run_in_threadpool(service.portfolio.unload, body.lora_name, service.unregister)
        except UnknownModel as error:
            raise Refusal(
                404, f"The lora adapter '{body.lora_name}' cannot be found.", param="lora_name", code="not_found"
            ) from error
        except InputError as error:
            raise invalid(error.field, f"'{body.lora_name}' {error.problem}. {error.remedy}") from error
        http.scope["record"].asked = body.lora_name
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @router.get("/health")
    async def health() -> Response:
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    @router.get("/ready")
    async def ready() -> Response:
        status = "ready" if service.ready else "draining" if service.engine.alive else "the engine has stopped"
        return JSONResponse({"status": status}, 200 if service.ready else 503)

    @router.get("/metrics")
    async def metrics(http: Http) -> Response:
        require_admin(http)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def require_admin(http: Http) -> None:
    if not tenant_of(http).admin:
        raise Refusal(403, "This needs the key of an administrator.", code="insufficient_permissions")
