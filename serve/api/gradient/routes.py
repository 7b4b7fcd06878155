"""The Gradient wire, for the official SDK: adapters that are created, trained by synchronous calls and completed in between.

    POST /api/models ─▶ Tuner.create        …/fine-tune ─▶ Tuner.fine_tune: one update        …/complete ─▶ Backend.submit

An adapter belongs to the caller's tenant, and is seen in the workspace it was created in alone.
"""

from __future__ import annotations

import asyncio
import random
import re
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, cast

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response

from jaxlora.config.training import Optimizer
from jaxlora.core.errors import AdapterNotFound, DeadlineExceeded, NotFound
from jaxlora.core.lora import LAYER_TARGETS, NAME_PATTERN, LoraSpec
from serve.access.caller import caller_of
from serve.access.rate_limit import Limiter
from serve.api.gradient.complete import Completer, GradientConfig
from serve.api.gradient.errors import API, GRADIENT_ERRORS, NotTrainable, UnknownBase, UnknownCollection
from serve.api.gradient.examples import examples_of
from serve.api.gradient.schemas import (
    MAX_NAME,
    BaseModelObject,
    Capability,
    CompleteBody,
    Completion,
    CreateBody,
    Created,
    EmbeddingsModels,
    FineTuneBody,
    FineTunedObject,
    InitialHyperparameters,
    LoraHyperparameters,
    ModelAdapterObject,
    Models,
    ModelsQuery,
    Nothing,
    TrainingArguments,
)
from serve.api.openai.tokenizing import Tokenizing
from serve.db.gradient import StoredGradient
from serve.db.models import GradientRecord, JsonObject
from serve.http.idempotency import KEY_PARAMETER, Once
from serve.http.schema import ok
from serve.http.strict_json import JsonRoute
from serve.jobs.on_demand import Tuner
from serve.runtime.backend import Backend
from serve.runtime.catalog import RESERVED_NAMES
from serve.runtime.job_names import JOB_PREFIX

BASE_END, ADAPTER_END = "_base_ml_model", "_model_adapter"  # 14 characters after a UUID's 36: the SDK wants 50
NAMESPACE = uuid.UUID("6f0d4a52-0a3f-5d0e-9a55-3c1f4f5c9b1e")  # of base ids
PAGE = 1000
NO_ADAPTER, NO_BASE = "no model adapter of that id", "no base model of that id"

Workspace = Annotated[str, Header(alias="x-gradient-workspace-id", min_length=1, max_length=MAX_NAME)]


class GradientRoutes:
    """The routes.  Of one event loop."""

    def __init__(
        self,
        backend: Backend,
        config: GradientConfig,
        *,
        records: StoredGradient,
        once: Once | None,
        tuner: Tuner | None,
        limiter: Limiter | None = None,
        draw: Callable[[], float] = random.random,
    ):
        """once, tuner: None for a server that does not train, or only reads.  limiter: of each tenant's tokens.

        draw: numbers in [0, 1) that choose among choices.
        """
        self._backend, self._config, self._records, self._once = backend, config, records, once
        self._tuner, self._limiter, self._ask = tuner, limiter, records.database.ask
        self._tokenizing = Tokenizing(backend, limiter)
        self._completer = Completer(backend, self._tokenizing, config.max_tokens, draw, limiter)
        self._creating = asyncio.Lock()
        self.base_id = str(uuid.uuid5(NAMESPACE, backend.base_name)) + BASE_END

    def router(self) -> APIRouter:
        """All routes of this wire."""
        router = APIRouter(prefix=API, responses=GRADIENT_ERRORS, route_class=JsonRoute)
        for method, path, handler, answer in (
            ("GET", "/models", self.list_models, Models),
            ("POST", "/models", self.create, Created),
            ("GET", "/models/{id}", self.read, ModelAdapterObject),
            ("DELETE", "/models/{id}", self.delete, Nothing),
            ("POST", "/models/{id}/fine-tune", self.fine_tune, FineTunedObject),
            ("POST", "/models/{id}/complete", self.complete, Completion),
            ("GET", "/embeddings", self.embeddings, EmbeddingsModels),
        ):
            router.add_api_route(
                path,
                handler,
                methods=[method],
                response_model=None,
                responses=ok(answer),
                openapi_extra=KEY_PARAMETER if handler == self.fine_tune else None,
            )
        return router

    # ---- models ---------------------------------------------------------------------------------------------------

    async def list_models(
        self, request: Request, query: Annotated[ModelsQuery, Query()], workspace: Workspace
    ) -> Response:
        """The base, then the workspace's adapters, newest first; all of them can what the base can."""
        capabilities: list[Capability] = ["complete"] if self._tuner is None else ["complete", "fineTune"]
        if query.capability not in ("any", *capabilities):
            return JSONResponse(Models(models=[]))
        name = self._backend.base_name
        slug = re.sub(r"[^a-z0-9.]+", "-", name.rpartition("/")[2].lower()).strip("-")
        models: list[BaseModelObject | ModelAdapterObject] = [
            {
                "type": "baseModel",
                "id": self.base_id,
                "name": name,
                "slug": slug or "base",
                "capabilities": capabilities,
            }
        ]
        if query.only_base == "false":
            models += [adapter_object(r, self.base_id) for r in await self._seen(request, workspace)]
        return JSONResponse(Models(models=models))

    async def create(self, request: Request, body: CreateBody, workspace: Workspace) -> Response:
        """Creates an adapter, which changes nothing yet and can be completed with at once."""
        if body.model.base_model_id != self.base_id:
            raise UnknownBase(NO_BASE, param="model.baseModelId")
        tuner = self._need_tuner()
        hyper = body.initial_hyperparameters or InitialHyperparameters()
        lora = hyper.lora_hyperparameters or LoraHyperparameters()
        spec, settings = self._spec(lora), self._settings(hyper.training_arguments or TrainingArguments())
        owner, id, now_s = caller_of(request).owner, str(uuid.uuid4()) + ADAPTER_END, time.time()
        if self._limiter is not None:
            self._limiter.admit(owner, tokens=0)
        async with self._creating:  # or two of one name would both find it free
            record = GradientRecord(
                id=id,
                tenant=owner,
                workspace=workspace,
                adapter=self._free_name(owner, body.model.name, id),
                base=self._backend.base_name,
                settings={"name": body.model.name, **settings},
                created_s=now_s,
                updated_s=now_s,
            )
            await self._ask(self._records.insert, record)
            try:
                seed = secrets.randbelow(2**32) if lora.seed is None else lora.seed
                await tuner.create(owner, record.adapter, spec, seed)
            except BaseException:
                await self._ask(self._records.delete, id, owner)
                raise
        return JSONResponse(Created(id=id))

    def _spec(self, lora: LoraHyperparameters) -> LoraSpec:
        targets = LAYER_TARGETS if lora.target_modules in (None, "all-linear") else tuple(lora.target_modules)
        return LoraSpec(
            rank=self._config.rank if lora.rank is None else lora.rank,
            alpha=self._config.alpha if lora.alpha is None else lora.alpha,
            targets=targets,
            rslora=bool(lora.use_rslora),
        )

    def _settings(self, training: TrainingArguments) -> JsonObject:
        """Returns the optimizer settings, as the database keeps them."""
        return {
            "lr": self._config.default_lr if training.learning_rate is None else training.learning_rate,
            "weight_decay": 0.0 if training.weight_decay is None else training.weight_decay,
            "clip": 1.0 if training.max_grad_norm is None else training.max_grad_norm,
        }

    def _free_name(self, owner: str, wanted: str, id: str) -> str:
        """What the adapter is called on the other wires: as it was named, if that is a name and nobody's yet, else its id."""
        if NAME_PATTERN.fullmatch(wanted) is None or wanted in RESERVED_NAMES or wanted.startswith(JOB_PREFIX):
            return id
        try:
            self._backend.resolve(owner, wanted)
        except AdapterNotFound:
            return id if self._need_tuner().is_made_by_job(owner, wanted) else wanted
        return id

    async def read(self, request: Request, id: str, workspace: Workspace) -> Response:
        """One adapter."""
        return JSONResponse(adapter_object(await self._find(request, id, workspace), self.base_id))

    async def delete(self, request: Request, id: str, workspace: Workspace) -> Response:
        """Deletes the adapter at once; requests that run end on it."""
        record = await self._find(request, id, workspace)
        tuner = self._need_tuner()
        try:
            await self._ask(self._records.delete, id, record.tenant)
            await tuner.delete(record.tenant, record.adapter)
        except NotFound:
            raise AdapterNotFound(NO_ADAPTER) from None  # somebody was faster
        return JSONResponse(Nothing())

    async def embeddings(self, request: Request, workspace: Workspace) -> Response:
        """None: the SDK knows one model only, which is not ours."""
        return JSONResponse(EmbeddingsModels(embeddingsModels=[]))

    def _need_tuner(self) -> Tuner:
        if self._tuner is None:
            raise NotTrainable("this server does not train; start one with a [training] section")
        return self._tuner

    def _lives(self, record: GradientRecord) -> bool:
        """Whether the adapter is still there: other wires may have deleted it."""
        try:
            return self._backend.resolve(record.tenant, record.adapter) is not None
        except AdapterNotFound:
            return False

    async def _seen(self, request: Request, workspace: str) -> list[GradientRecord]:
        """The workspace's adapters, newest first."""
        found: list[GradientRecord] = []
        after, more = None, True
        while more:
            page = await self._ask(self._records.page, caller_of(request).sees, after=after, limit=PAGE)
            found += [r for r in page.records if r.workspace == workspace and self._lives(r)]
            more = page.more
            after = page.records[-1].id if page.records else None
        return found

    async def _find(self, request: Request, id: str, workspace: str) -> GradientRecord:
        """One adapter.  Raises AdapterNotFound, the same for another's, another workspace's and none."""
        try:
            record = await self._ask(self._records.get, id, caller_of(request).sees)
        except NotFound:
            raise AdapterNotFound(NO_ADAPTER) from None
        if record.workspace != workspace or not self._lives(record):
            raise AdapterNotFound(NO_ADAPTER)
        return record

    # ---- training and completing ----------------------------------------------------------------------------------

    async def fine_tune(self, request: Request, id: str, body: FineTuneBody, workspace: Workspace) -> Response:
        """Makes one update by all samples, and answers when the next request gets the new version.

        The update is made also when the client is gone.  With a key that came before, repeats the answer.
        """
        if id == self.base_id:
            raise NotTrainable("a base model is not fine-tuned; create an adapter")
        self._need_tuner()
        record = await self._find(request, id, workspace)
        assert self._once is not None, "a server with a tuner has it"
        # Route and content are those under which the first releases stored their answers.
        answer = self._once.answer(
            request, body.model_dump_json(), lambda: self._train(record, body), route=f"{API}/{record.id}"
        )
        return await within(request, asyncio.shield(answer))

    async def _train(self, record: GradientRecord, body: FineTuneBody) -> FineTunedObject:
        """Trains once and returns what it did."""
        tokenizer, longest = self._backend.tokenizer, self._config.longest
        examples = await self._tokenizing.run(
            record.tenant,
            lambda: examples_of(tokenizer, body.samples, longest),
            field="samples",
            chars=[sum(len(span.value) for span in sample.spans) for sample in body.samples],
            most=longest,
        )
        if self._limiter is not None:
            self._limiter.admit(record.tenant, tokens=sum(map(len, examples)))
        settings = record.settings
        optimizer = Optimizer(
            lr=cast(float, settings["lr"]),
            weight_decay=cast(float, settings["weight_decay"]),
            clip=cast(float, settings["clip"]),
            schedule="constant",
            total_steps=1,
        )
        done = await self._need_tuner().fine_tune(record.tenant, record.adapter, examples, optimizer)
        await self._ask(self._records.trained, record.id, record.tenant, time.time())
        return {"numberOfTrainableTokens": done.tokens, "sumLoss": done.sum_loss}

    async def complete(self, request: Request, id: str, body: CompleteBody, workspace: Workspace) -> Response:
        """Completes a query."""
        if body.rag is not None:
            raise UnknownCollection("no RAG collection of that id: this server has none", param="rag.collectionId")
        ref = None
        if id.endswith(BASE_END) and id != self.base_id:
            raise UnknownBase(NO_BASE)
        if id != self.base_id:
            record = await self._find(request, id, workspace)
            ref = self._backend.resolve(record.tenant, record.adapter)
        finish, text = await within(request, self._completer.complete(request, id, ref, body))
        return JSONResponse(Completion(finishReason=finish.value, generatedOutput=text))


async def within[Result](request: Request, work: Awaitable[Result]) -> Result:
    """Returns the result of the work.  Raises DeadlineExceeded when the time of the request is over first."""
    limit = asyncio.timeout_at(request.state.deadline)
    try:
        async with limit:
            return await work
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded("the time of this request is over before its answer; ask for less, or later") from error


def adapter_object(record: GradientRecord, base_id: str) -> ModelAdapterObject:
    """An adapter as clients read it."""
    updated = datetime.fromtimestamp(record.updated_s, UTC).isoformat(timespec="milliseconds")
    return {
        "type": "modelAdapter",
        "id": record.id,
        "name": cast(str, record.settings["name"]),
        "baseModelId": base_id,
        "latestUpdateTime": updated.replace("+00:00", "Z"),
    }
