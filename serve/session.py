"""Many tenants in a notebook: `Session` puts a trainer and a server over one base and gives both a few plain calls.

    from jaxlora import Session

    with Session.open("smollm2") as session:
        session.add_tenant("dates", examples)
        session.step(20)
        print(session.sample("dates", [{"role": "user", "content": "14 May"}]))

Everything runs on the device thread of its `DeviceThread`, so any thread may call, and answers come while others train.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

from jaxlora.core.errors import PackageHidden
from jaxlora.neighbours import hidden_neighbours

if why := hidden_neighbours():  # else the imports below run a train.py of the user's, and fail with a riddle
    raise PackageHidden(why)

from jaxlora.checkpoints.load import Opened, load_found
from jaxlora.config.base import DEMO_MODEL, ONE_DEVICE, Dtype, MeshSection, ModelSection, Quantization
from jaxlora.config.serving import ServeConfig, TrainingSection
from jaxlora.config.training import PASSES, LossName, Recipe, Schedule, TooLong, default_lr
from jaxlora.config.words import in_our_words
from jaxlora.core.adapter_size import AdapterSize, adapter_size
from jaxlora.core.errors import InvalidRequest, JaxLoraError, NotFound
from jaxlora.core.lora import LAYER_TARGETS, AdapterRef, check_name
from jaxlora.core.progress import Progress, screen_on
from jaxlora.model import compile_cache
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.machine import memory_errors
from jaxlora.peft.folder import export_peft
from serve.access.caller import LOCAL_TENANT
from serve.engine.request import Request, SamplingParams
from serve.runtime.device_thread import DeviceThread
from serve.runtime.live_training import LiveTraining, small_trainer, warm_up
from serve.server.build import make_runner, open_store, planned, stop
from train.data.examples import Unit
from train.data.load import LengthLimit, load_file, load_records
from train.trainer import Evaluation, StepReport, Tenant, Trainer

DEFAULTS = Recipe()
POLL_S = 0.2  # how often `wait` looks

LOG = logging.getLogger("serve")
Data = str | Path | Iterable[Mapping[str, object] | Unit]  # a file, or a list of records as its lines hold


class Session:
    """Tenants that train on one base and answer while they do.  `close` it, or use it in a `with`."""

    def __init__(
        self, opened: Opened, runner: DeviceThread, trainer: Trainer, end: contextlib.ExitStack, publish_every: int
    ):
        """Over a runner that runs and a trainer that is warm; `end` is what `close` unwinds.  See `open`."""
        self.base_name, self.opened = opened.name, opened
        self._runner, self._trainer, self._end = runner, trainer, end
        self._reports: list[StepReport] | None = None  # of the step that `step` waits for
        self._published: dict[str, int] = {}  # tenant → step of its newest version
        self._heldout: dict[str, Sequence[Unit]] = {}
        self._ids = itertools.count()
        self._live = LiveTraining(
            trainer,
            runner.publisher,
            publish_every=publish_every,
            on_step=self._heard,
            on_publish=lambda ref, step: self._published.update({ref.name: step}),
        )

    @classmethod
    @in_our_words
    def open(
        cls,
        model: str | Path = DEMO_MODEL,
        *,
        dtype: Dtype = "auto",
        quantization: Quantization = "none",
        mesh: MeshSection = ONE_DEVICE,
        slots: int = 8,
        max_rank: int = DEFAULTS.rank,
        targets: tuple[str, ...] = LAYER_TARGETS,
        lanes: int = 4,
        lane_tokens: int = 256,
        longest_tokens: int | None = None,
        publish_every: int = 10,
        store: str | Path | None = None,
        memory_gb: float | None = None,
        progress: bool | None = None,
    ) -> Session:
        """Loads a base and compiles all that training and serving need: "smollm2", a directory, a .gguf file or a hub id.

        slots, max_rank, targets: of the adapters that train at once.  lanes, lane_tokens: rows of a training step and
        their tokens, whose cost does not depend on how many tenants there are.  longest_tokens: of an example; tenants with
        examples longer than a row get longer rows, which compile programs of their own; None: lane_tokens.  publish_every: steps of a tenant between
        the versions that it makes by itself.  store: the folder that keeps the versions, for `jaxlora serve`; None: a
        temporary one.  quantization: int8 keeps the weights in 8 bits, on a CPU.  memory_gb: the most memory to take; None: what is available.  progress: whether stderr tells how
        far this is; None: in a notebook and on a terminal.
        The server's other sizes are chosen from the memory, as those of `jaxlora serve` are.
        Raises ModelInvalid, ConfigInvalid, AdapterInvalid, InvalidRequest; StorageFailed or StateInvalid for the store.
        """
        if publish_every < 1:
            raise InvalidRequest(f"publish_every must be at least 1, got {publish_every}", param="publish_every")
        with named_errors():
            section = ModelSection(path=str(model), dtype=dtype, quantization=quantization)
            pool = PoolSpec(slots=slots, rank=max_rank, dtype="float32", targets=targets)
            training = TrainingSection(
                slots=slots, max_rank=max_rank, lanes=lanes, lane_tokens=lane_tokens, longest_tokens=longest_tokens
            )
        compile_cache.enable(None)
        told = Progress(screen_on(sys.stderr) if (is_watched() if progress is None else progress) else None)
        with contextlib.ExitStack() as end:
            folder = end.enter_context(tempfile.TemporaryDirectory(prefix="jaxlora-")) if store is None else store
            settings = ServeConfig(
                model=section,
                mesh=mesh,
                memory_gb=memory_gb,
                slots=slots,
                max_rank=max_rank,
                adapters=Path(folder),
                training=training,
            )
            found, config = planned(settings, say=lambda line: None)
            with memory_errors(f"opening {found.name}", "slots, max_rank, lanes, lane_tokens or longest_tokens"):
                with told.stage(f"opening {found.name}"):
                    opened = load_found(found, section, mesh)
                assert config.training is not None
                trainer = small_trainer(opened, pool, lanes=lanes, lane_tokens=config.training.lengths)
                shelf = open_store(config)
                end.callback(shelf.close)
                runner = make_runner(opened, config, shelf)
                end.callback(stop, runner, shelf)
                with told.stage("compiling", unit="serving programs") as stage:
                    runner.start(stage.at)
                with told.stage("compiling", unit="training programs") as stage:
                    runner.call(lambda: warm_up(trainer, runner.publisher, stage.at))
            return cls(opened, runner, trainer, end.pop_all(), publish_every)

    def close(self) -> None:
        """Ends the device thread, saves what is to be kept and removes what is not.  A second time it does nothing."""
        self._end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- tenants --------------------------------------------------------------------------------------------------

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        """Those who have a seat, as they are now: status, step, losses and more."""
        return self._trainer.tenants

    @in_our_words
    def add_tenant(
        self,
        name: str,
        data: Data,
        *,
        heldout: Data | None = None,
        loss: LossName = DEFAULTS.loss,
        beta: float | None = DEFAULTS.beta,
        clip_low: float | None = DEFAULTS.clip_low,
        clip_high: float | None = DEFAULTS.clip_high,
        rank: int = DEFAULTS.rank,
        alpha: float = DEFAULTS.alpha,
        targets: tuple[str, ...] = DEFAULTS.targets,
        rslora: bool = DEFAULTS.rslora,
        dropout: float = DEFAULTS.dropout,
        lr: float | None = DEFAULTS.lr,
        schedule: Schedule = DEFAULTS.schedule,
        warmup_steps: int | None = DEFAULTS.warmup_steps,
        weight_decay: float = DEFAULTS.weight_decay,
        clip: float = DEFAULTS.clip,
        loraplus_ratio: float = DEFAULTS.loraplus_ratio,
        batch: int = DEFAULTS.batch,
        steps: int | None = DEFAULTS.steps,
        too_long: TooLong = DEFAULTS.too_long,
        seed: int = DEFAULTS.seed,
    ) -> Tenant:
        """A tenant joins from the next step on, whoever trains.  The settings, and what they are if not given, are Recipe's.

        Others' words for the same are accepted, such as learning_rate, r and lora_alpha (`jaxlora.config.words`).

        Raises DataInvalid, AdapterInvalid, ConfigInvalid, InvalidRequest, AlreadyExists; StateInvalid when no slot is free.
        """
        self._runner.catalog.check_name(check_name(name, "name"), name)
        with named_errors():
            recipe = Recipe(
                loss=loss,
                beta=beta,
                clip_low=clip_low,
                clip_high=clip_high,
                rank=rank,
                alpha=alpha,
                targets=targets,
                rslora=rslora,
                dropout=dropout,
                lr=lr,
                schedule=schedule,
                warmup_steps=warmup_steps,
                weight_decay=weight_decay,
                clip=clip,
                loraplus_ratio=loraplus_ratio,
                batch=batch,
                steps=steps,
                too_long=too_long,
                seed=seed,
            )
        held = [] if heldout is None else self._read(heldout, loss, too_long)
        return self._add(name, recipe, self._read(data, loss, too_long), held)

    def _add(self, name: str, recipe: Recipe, examples: Sequence[Unit], heldout: Sequence[Unit]) -> Tenant:
        passes = math.ceil(PASSES * len(examples) / recipe.batch)
        optimizer = recipe.optimizer(default_steps=passes, default_lr=default_lr(self.opened.base.config))
        batches = self._trainer.check(recipe.spec, examples, recipe.batch, recipe.objective)

        def join() -> Tenant:
            tenant = self._trainer.add(
                name,
                recipe.spec,
                optimizer,
                batches,
                batch_size=recipe.batch,
                seed=recipe.seed,
                loss=recipe.objective,
            )
            self._heldout[name] = heldout
            self._published.pop(name, None)  # an earlier tenant's of that name
            return tenant

        return self._runner.call(join)

    def _read(self, data: Data, loss: str, too_long: TooLong) -> Sequence[Unit]:
        limit = LengthLimit(lane_tokens=self._trainer.lane_tokens, too_long=too_long, measured=True)
        if isinstance(data, str | Path):
            loaded = load_file(data, self.opened.tokenizer, limit=limit, loss=loss)
        else:
            loaded = load_records(data, self.opened.tokenizer, limit=limit, loss=loss)
        if loaded.note is not None:
            LOG.warning("%s: %s", data if isinstance(data, str | Path) else "data", loaded.note)
        return loaded.units

    def remove(self, name: str) -> None:
        """The tenant leaves and its slot is free; the versions it has published stay.  Raises NotFound."""

        def leave() -> None:
            self._trainer.remove(name)
            del self._heldout[name]

        self._runner.call(leave)

    @property
    def has_work(self) -> bool:
        """Whether a tenant is training."""
        return self._runner.call(lambda: self._trainer.has_work)

    # ---- training -------------------------------------------------------------------------------------------------

    def step(self, n: int = 1) -> list[StepReport]:
        """At most n steps, each for all whose turn it is; a report for each tenant in each.  Ends early when all are done.

        Raises StateInvalid when nobody trains.
        """
        reports: list[StepReport] = []
        for i in range(n):
            if i and not self.has_work:
                break
            reports += self._runner.call(self._step)
        return reports

    def _step(self) -> list[StepReport]:
        self._reports = reports = []
        try:
            self._live.step()
        finally:
            self._reports = None
        return reports

    def _heard(self, reports: list[StepReport]) -> None:
        if self._reports is not None:
            self._reports += reports

    def start(self) -> None:
        """From now on all train in the background, also those who join later; every other call may be made meanwhile."""
        self._runner.call(lambda: setattr(self._runner, "trainer", self._live))

    def wait(self) -> None:
        """Trains in the background until every tenant is done.  Ctrl-C ends it after the present step."""
        self.start()
        try:
            while self.has_work:
                time.sleep(POLL_S)
        finally:
            self._runner.call(lambda: setattr(self._runner, "trainer", None))

    def evaluate(self, name: str, data: Data | None = None, *, tuned: bool = True) -> Evaluation:
        """Loss and accuracy of a tenant's present weights, by its loss, on these examples or else its held-out ones.

        Not tuned: of the base in place of its adapter.
        Raises NotFound, DataInvalid; InvalidRequest when it has no held-out examples and none are given.
        """
        tenant = self._tenant(name)
        examples = self._heldout[name] if data is None else self._read(data, tenant.loss.name, "error")
        if not examples:
            raise InvalidRequest(f"tenant {name} has no held-out examples; give `data`", param="data")
        return self._runner.call(lambda: self._trainer.evaluate_all([(examples, name)], tuned=tuned)[0])

    def _tenant(self, name: str) -> Tenant:
        if name not in self.tenants:
            raise NotFound(f"no tenant {name} in training", param="name")
        return self.tenants[name]

    # ---- answers --------------------------------------------------------------------------------------------------

    def sample(
        self,
        model: str,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        max_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: tuple[str, ...] = (),
    ) -> str:
        """What a tenant's present weights answer to a text, as it stands, or to the messages of a conversation.

        model: a tenant; NAME@VERSION for an older version; `base_name` for the base.  Weights that no version holds yet
        are published first.
        Raises AdapterNotFound, InvalidRequest, ContextLengthExceeded; AdapterNotFinite as `publish` does.
        """
        tokenizer = self.opened.tokenizer
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
        tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.chat(prompt)
        request = Request(
            id=f"session-{next(self._ids)}",
            tenant=LOCAL_TENANT,
            adapter=self._newest(model),
            prompt=tuple(tokens),
            params=params,
        )
        return self._runner.complete([request])[0].text

    def publish(self, name: str) -> AdapterRef:
        """A new version of a tenant's present weights: a copy on the device.  Its newest three stay.

        Raises NotFound, and AdapterNotFinite when a weight is not finite.
        """
        return self._runner.call(lambda: self._live.publish(name))

    def size(self, name: str) -> AdapterSize:
        """How large a tenant's adapter is: trainable parameters, their share, bytes.  Raises NotFound."""
        return adapter_size(self.opened.base.config, self._tenant(name).spec)

    def save(self, model: str, folder: str | Path, *, replace: bool = False) -> AdapterSize:
        """Writes what `sample` would ask as a PEFT folder and returns its size; `replace`: in place of one that is there.

        Raises AdapterNotFound, InvalidRequest for the base, AlreadyExists.
        """
        ref = self._newest(model)
        if ref is None:
            raise InvalidRequest(f"{model} is the base model; name a tenant", param="model")
        adapter = self._runner.engine.store.get(ref)
        config = self.opened.base.config
        return export_peft(adapter, Path(folder), config, base_name=self.opened.name, replace=replace)

    def _newest(self, model: str) -> AdapterRef | None:
        """The version a name means now, with what its tenant has learned since the last one; None is the base."""

        def find() -> AdapterRef | None:
            tenant = self.tenants.get(model)
            if tenant is None:
                return self._runner.resolve(None, model)
            if self._published.get(model) != tenant.step:
                self._live.publish(model)
            return self._runner.resolve(model, model)

        return self._runner.call(find)


def is_watched() -> bool:
    """Whether somebody sees stderr: at a terminal, or in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


@contextlib.contextmanager
def named_errors() -> Generator[None]:
    """Settings raise a plain ValueError, which names the value: a caller gets it as InvalidRequest."""
    try:
        yield
    except JaxLoraError:
        raise
    except ValueError as e:
        raise InvalidRequest(str(e)) from e
