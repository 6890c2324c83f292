"""Settings of `stage=serve`, which serves many adapters on one base model with OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from align.config.addresses import LOOPBACK, require_valid_url
from align.config.settings import Settings, setting
from align.core.aliases import NAME, NAME_REMEDY, parse_aliases
from align.core.errors import InputError, require
from align.core.files import parse_user_path

ACTIONS = {
    "serve": "answers requests",
    "key": "makes a tenant or a further key of one, or changes a tenant's rights and limits, in the key file",
    "tenants": "prints the tenants of the key file with their rights, limits, ids of keys and usage",
}
DOES = "; ".join(f"`{action}` {does}" for action, does in ACTIONS.items())
LIMITS = ("allow", "requests_per_minute", "tokens_per_minute", "concurrency", "token_budget")
KEPT = "Not given: a known tenant keeps its value, a new one has no limit."


@dataclass
class ServeConfig(Settings):
    """A server for many adapters on one base, with OpenAI's API. `stage.action=key` manages the tenants of its key
    file, and `stage.action=tenants` shows them. The running server reads the file again when it changes."""

    AT: ClassVar[str] = "stage"

    name: str = "serve"
    action: str = setting("serve", f"What is done: {DOES}.", choices=tuple(ACTIONS))
    host: str = setting("127.0.0.1", "Interface that the server listens at.")
    port: int = setting(8000, "Port that the server listens at.", at_least=1024, at_most=65535)
    url: str | None = setting(None, "The server's address for its clients, such as https://models.example.org.")
    adapters: Any = setting(
        None,
        "Adapters by name, such as {support: ppo:latest, legal: sft:legal}. A further {chat: {support: 0.9, legal: "
        "0.1}} divides the users of the name chat over adapters by weight. `base` is the base without an adapter. "
        "Empty: the base of `model=` alone.",
    )
    keys: str | None = setting(
        None,
        "The key file, outside of the run folders. Not given: no keys; the server listens on the loopback interface "
        "only, and anyone who reaches it may do everything.",
    )
    roots: list[str] = setting([], "Folders from which adapters may be loaded at run time. Empty: none may.")
    slots: int = setting(32, "Answers that are decoded together in one batch.", above=0)
    resident: int = setting(16, "Adapters whose weights are in memory at once.", above=0)
    max_rank: int | None = setting(
        None,
        "Highest rank of an adapter; memory is reserved for `resident` of them. Not given: 256; with serve=vllm the "
        "highest of `adapters`, at least 16.",
        above=0,
    )
    max_length: int | None = setting(
        None, "Longest prompt with its answer. Not given: the model's context length.", unit="tokens", at_least=2
    )
    queue: int = setting(256, "Requests that wait at most; further ones are refused with status 429.", above=0)
    max_prompts: int = setting(
        32, "Prompts, or conversations of a reward model, in one request. More are refused with status 400.", above=0
    )
    max_logprobs: int = setting(
        100_000,
        "Largest number of logprobs that one request may ask for: its tokens (max_tokens of all answers, and echoed "
        "prompts) times (top_logprobs + 1). Each takes about 80 bytes. A request for more is refused with status 400 "
        "before it is queued.",
        above=0,
    )
    max_answers: int = setting(
        256,
        "Answers that a tenant has at once if its `concurrency` is not set. A request for more is refused with status "
        "400, and one that comes while others are under way with status 429.",
        above=0,
    )
    drain_s: float = setting(
        30.0,
        "Time that requests under way have after SIGTERM. New requests are refused during that time.",
        unit="seconds",
        at_least=0,
    )
    prefix_cache_mb: int = setting(256, "Memory for the prefixes of earlier prompts.", unit="MB", at_least=0)
    tenant: str | None = setting(None, "The tenant that `key` makes or changes, or the only one that `tenants` shows.")
    admin: bool | None = setting(
        None, "`key`: whether the tenant may load and unload adapters. Not given: as before; a new one may not."
    )
    allow: Any = setting(None, f"`key`: names that the tenant may ask for, such as [support, legal]. {KEPT}")
    requests_per_minute: int | None = setting(None, f"`key`: the tenant's requests a minute. {KEPT}", above=0)
    tokens_per_minute: int | None = setting(
        None, f"`key`: the tenant's tokens a minute, prompts and answers together. {KEPT}", above=0
    )
    concurrency: int | None = setting(None, f"`key`: the tenant's answers at once. {KEPT}", above=0)
    token_budget: int | None = setting(
        None, f"`key`: the tenant's tokens in all, prompts and answers together. {KEPT}", unit="tokens", at_least=0
    )
    lift: list[str] = setting([], "`key`: limits to take away from the tenant.", choices=LIMITS)
    revoke: str | None = setting(None, "`key`: the id of a key of the tenant to revoke, or `all`.")

    def check_together(self) -> None:
        parse_aliases(self.adapters, "stage.adapters")
        {"serve": self.check_server, "key": self.check_key, "tenants": self.check_tenants}[self.action]()

    def check_server(self) -> None:
        """Raise InputError if other machines could reach a server without API keys, or `stage.url` is invalid.

        A server that other machines reach must have a `stage.url`.
        """
        if self.keys is None:
            problem = "without stage.keys the server lets in anyone who reaches it"
            remedy = "Make a key file with stage.action=key, and add stage.keys=FILE"
            local = self.host in LOOPBACK
            require(local, "stage.host", self.host, problem, f"{remedy}, or leave stage.host at 127.0.0.1.")
            require(self.url is None, "stage.url", self.url, problem, f"{remedy}, or leave stage.url out.")
        require_valid_url(self.host, self.url)
        self.refuse_changes("tenant")

    def refuse_changes(self, *further_keys: str) -> None:
        """Raise InputError if a setting for changing tenants (`stage.action=key`) is set with another action."""
        changes = [key for key in (*further_keys, "admin", *LIMITS, "revoke") if getattr(self, key) is not None]
        if self.lift:
            changes.append("lift")
        if changes:
            value = getattr(self, changes[0])
            remedy = "Add stage.action=key, or leave it out."
            raise InputError(f"stage.{changes[0]}", value, "is a setting of stage.action=key", remedy)

    def check_tenants(self) -> None:
        problem = "stage.action=tenants needs a key file"
        require(self.keys is not None, "stage.keys", None, problem, "Add stage.keys=FILE.")
        self.refuse_changes()

    def check_key(self) -> None:
        """Raise InputError if `stage.action=key` has no key file or valid tenant, or both sets and lifts a limit."""
        require(self.keys is not None, "stage.keys", None, "stage.action=key needs a key file", "Add stage.keys=FILE.")
        is_name = self.tenant is not None and NAME.fullmatch(self.tenant) is not None
        problem = "is no name of a tenant" if self.tenant else "stage.action=key needs a tenant"
        require(is_name, "stage.tenant", self.tenant, problem, f"Add stage.tenant=NAME. {NAME_REMEDY}")
        if self.allow is not None:
            is_list = isinstance(self.allow, Sequence) and not isinstance(self.allow, str)
            are_names = is_list and all(isinstance(name, str) and name for name in self.allow)
            remedy = 'Write "stage.allow=[support, legal]".'
            require(are_names, "stage.allow", self.allow, "is no list of names", remedy)
        both = [key for key in self.lift if getattr(self, key) is not None]
        require(not both, "stage.lift", both, "is set and taken away in one command", "Leave one of the two out.")

    def check(self, config: Any) -> None:
        """Raise InputError if the file of API keys is in the folder of runs, which is copied and shown to others."""
        if self.keys is None:
            return
        is_public = parse_user_path(self.keys, "stage.keys").resolve().is_relative_to(config.run.folder.resolve())
        problem = "lies in the folder of the runs, which is copied and shown to others"
        require(not is_public, "stage.keys", self.keys, problem, "Choose a file outside of run.root.")
