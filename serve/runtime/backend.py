"""The protocol between the routes and the engine: what HTTP needs of the server, and no more.  Pure: no jax, no HTTP here.

Everything is called on the event loop's thread, except `models` and `model`, which may read the disk, and the tokenizer:
those are called from any thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.core.lora import AdapterRef
from serve.engine.grammar import Grammars
from serve.engine.request import Delta, Request


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What a client may know of one model: the base, or one adapter of its own."""

    id: str
    created: int  # seconds since 1970
    owned_by: str
    parent: str | None  # the base of an adapter; None for the base itself
    root: str
    version: int | None  # of an adapter: the version that `id` means now
    rank: int | None
    state: Literal["base", "device", "host", "disk"]  # of an adapter: where its weights are


class TokenStream(Protocol):
    """An async iterator of Delta; it ends after the one with `finish` or `error`."""

    def __aiter__(self) -> TokenStream: ...
    async def __anext__(self) -> Delta: ...
    def cancel(self) -> None:
        """Frees slot and KV within a step.  Idempotent, and without effect on a stream that has ended."""
        ...


class Backend(Protocol):
    """The server behind the routes."""

    @property
    def base_name(self) -> str: ...
    @property
    def context(self) -> int:
        """Tokens of one sequence: prompt and max_tokens together must fit."""
        ...

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def grammars(self) -> Grammars:
        """Compiles what answers must look like."""
        ...

    @property
    def started(self) -> float:
        """Seconds since 1970."""
        ...

    def models(self, tenant: str | None) -> list[ModelCard]:
        """The base and the tenant's adapters that can be read, in any order."""
        ...

    def model(self, tenant: str | None, model: str) -> ModelCard:
        """The card of any name `resolve` takes, with `id` as it was asked.  Raises AdapterNotFound."""
        ...

    def resolve(self, tenant: str | None, model: str) -> AdapterRef | None:
        """The version a name means now; None is the base model.  Raises AdapterNotFound, also for another's adapter."""
        ...

    def submit(self, request: Request) -> TokenStream:
        """The request's stream.  Raises Unavailable; all else that refuses or ends it comes as its last Delta, `error`."""
        ...

    def health(self) -> str:
        """ "ok", or what is wrong, in words fit for anyone."""
        ...
