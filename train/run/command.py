"""`jaxlora train CONFIG.toml` trains every tenant of a file together; `out` gets states, metrics, adapters and a plot.

out/TENANT/state/        Orbax checkpoints of its training state; a second run resumes from the newest
out/TENANT/metrics.csv   one row for each step
out/TENANT/heldout.csv   one row for each held-out loss
out/TENANT/tensorboard/  the same numbers as an event file: `tensorboard --logdir out`
out/TENANT/peft/         the trained adapter as a PEFT folder
out/TENANT/adapter.json  step and version of that adapter
out/store/               adapter versions, for `jaxlora serve`
out/loss.png, loss.svg   training and held-out losses of all

Several processes (`mesh.processes`) take every step together and read the same files; only the lead writes and prints.
What they decide from files they decide before the first step, while no process writes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from rich.console import Console
from rich.live import Live
from rich.table import Table

from jaxlora.checkpoints.load import Found, Opened, find_base, fitted, load_found
from jaxlora.config.training import PASSES, SizedTrainConfig, TenantSection, TrainConfig, default_lr
from jaxlora.core.adapter_size import AdapterSize, adapter_size
from jaxlora.core.atomic_files import replace_file
from jaxlora.core.errors import ConfigInvalid, InvalidRequest, StateInvalid
from jaxlora.core.lora import HEAD_TARGET, LAYER_TARGETS
from jaxlora.core.progress import Progress, Stage, moves, screen_on
from jaxlora.model import compile_cache, multihost
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.machine import machine_of, memory_errors
from jaxlora.model.memory_plan import plan_training
from jaxlora.peft.folder import export_peft
from jaxlora.storage.adapter_store import AdapterStore
from jaxlora.storage.checkpoints import read_meta, restore_state, save_state
from train.data.examples import Unit
from train.data.load import LengthLimit, load_file
from train.jobs.inputs import digest
from train.run import metrics
from train.run.loss_curves import LossCurves, write_pictures
from train.run.metrics import HELDOUT_COLUMNS, EventFile
from train.run.progress import ProgressScreen, progress
from train.step.state import SlotState
from train.trainer import MAX_BAD_STEPS, Evaluation, Trainer

HOST_BYTES = 2**30  # adapter versions kept in RAM


@dataclass(slots=True)
class Job:
    """One tenant of the file: its data, its files, and what its checkpoints must agree with."""

    folder: Path  # out/TENANT
    heldout: Sequence[Unit]  # may be empty
    identity: dict[str, object]  # what determined its training state
    saved: int | None = None  # step of its newest checkpoint
    delivered: int | None = None  # step of the adapter in the store and in `peft`
    version: int | None = None  # of that adapter; only the lead knows it

    @property
    def states(self) -> Path:
        """Returns the folder of the tenant's checkpoints."""
        return (self.folder / "state").absolute()

    @property
    def metrics(self) -> Path:
        """Returns the path of the metrics file, which has one row for each step."""
        return self.folder / "metrics.csv"

    @property
    def heldout_losses(self) -> Path:
        """Returns the path of the file of held-out losses."""
        return self.folder / "heldout.csv"

    def begin_files(self, step: int, before: Evaluation | None) -> None:
        """Cuts the files to the step that the tenant goes on from; before: the held-out result of a new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        metrics.cut(self.metrics, step)
        metrics.cut(self.heldout_losses, step if before is None else -1, HELDOUT_COLUMNS)
        if before is not None:
            metrics.append_heldout(self.heldout_losses, step, before)

    def curves(self) -> LossCurves:
        """Reads the losses so far."""
        heldout = metrics.losses(self.heldout_losses, HELDOUT_COLUMNS)
        return LossCurves(train=metrics.losses(self.metrics), heldout=heldout)

    def read_delivery(self) -> None:
        """Reads which step and version an earlier run delivered."""
        try:
            written = json.loads((self.folder / "adapter.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return
        if (self.folder / "peft").is_dir():
            self.delivered, self.version = written.get("step"), written.get("version")


# Text of an error message for a difference in each key of Job.identity.
SIZE_KEYS = "lanes, lane_tokens, slots or max_rank"
IDENTITY = {
    "base": "base model ([model] path)",
    "spec": "rank, alpha, targets, rslora or dropout",
    "seed": "seed",
    "examples": "examples (the train file, or the base's tokenizer)",
    "loss": "loss, beta, clip_low or clip_high",
    "moments": "moments",
    "pool": "max_rank, other buckets, or lm_head in some tenant's targets",
}


def main(settings: TrainConfig) -> None:
    """Trains all tenants of the file to their last step and writes `out`.  Ctrl-C saves all states first.

    Raises a JaxLoraError, nearly always before anything is written: ConfigInvalid, DataInvalid, ModelInvalid,
    AdapterInvalid and InvalidRequest for what the file asks for, StateInvalid for tenants that failed, StorageFailed for
    an `out` that cannot be written or read.
    """
    compile_cache.enable(None)
    settings = replace(settings, out=readable(settings.out))
    multihost.join(settings.mesh.processes)
    console = Console(quiet=not multihost.is_lead())
    told = Progress(screen_on(sys.stdout) if multihost.is_lead() else None)
    with told.stage("opening the base model"):
        found, config, lines = planned(settings)
        with memory_errors(f"opening {found.name}", SIZE_KEYS):
            opened = load_found(found, config.model, config.mesh)
            trainer = make_trainer(config, opened)
    with told.stage("reading", unit="files") as stage:
        jobs, notes = add_tenants(trainer, config, opened, stage)
    for note in notes:
        say(console, note)
    for tenant in trainer.tenants.values():
        if tenant.step:
            say(console, f"{progress(tenant)}, from its checkpoint")
    if not trainer.has_work and all(job.delivered == trainer.tenants[name].step for name, job in jobs.items()):
        say(console, f"nothing to do: every tenant has trained its last step and its adapter is in {config.out}")
        say(console, "to train on, raise `steps`; to train anew, name another `out` or remove this one")
        return
    for line in lines:
        say(console, line)
    with open_store(config) as store:
        with (
            told.stage("compiling", unit="training programs") as stage,
            memory_errors("compiling the step", SIZE_KEYS),
        ):
            trainer.warm_up(stage.at)
        before = asked(trainer, jobs, told, tuned=False)
        fresh = {name: e for name, e in before.items() if not trainer.tenants[name].step}  # B is zero: same as base
        if store is not None:
            for name, job in jobs.items():
                job.begin_files(trainer.tenants[name].step, fresh.get(name))
        screen = ProgressScreen(trainer.tenants, {name: e.nll for name, e in fresh.items()})
        run_steps(trainer, config, opened, jobs, store, console, told, screen)
        finish(trainer, config, jobs, console, told, before)


def planned(settings: TrainConfig) -> tuple[Found, SizedTrainConfig, Sequence[str]]:
    """Finds the base and chooses the sizes that the file leaves out; loads nothing.  Returns also the plan in words.

    Raises ModelInvalid, and ConfigInvalid for what does not fit.
    """
    machine, targets = machine_of(settings.mesh, settings.memory_gb), slot_targets(settings)
    found = find_base(settings.model)
    found, plan = fitted(found, settings.model, "auto", lambda base: plan_training(settings, targets, base, machine))
    return found, plan.config, plan.lines()


@contextlib.contextmanager
def open_store(config: SizedTrainConfig) -> Generator[AdapterStore | None]:
    """Opens the store that receives adapters; yields None in a process that does not write."""
    if not multihost.is_lead():
        yield None
        return
    with contextlib.closing(AdapterStore(config.out / "store", host_bytes=HOST_BYTES)) as store:
        yield store


def slot_targets(config: TrainConfig) -> tuple[str, ...]:
    """Returns what a slot holds: all linears of the layers, and the head only where a tenant wants it."""
    wanted = {target for tenant in config.tenant for target in tenant.targets}
    return LAYER_TARGETS + ((HEAD_TARGET,) if HEAD_TARGET in wanted else ())


def make_trainer(config: SizedTrainConfig, opened: Opened) -> Trainer:
    """Returns a trainer of the file's sizes."""
    targets = slot_targets(config)
    buckets = [PoolSpec(slots=n, rank=rank, dtype="float32", targets=targets) for rank, n in config.buckets]
    return Trainer(
        opened.base,
        opened.mesh,
        buckets,
        lanes=config.lanes,
        lane_tokens=config.lane_tokens,
        base_hash=opened.base_hash,
        moments=config.moments,
        remat=config.remat,
        passes=config.passes,
    )


def readable(path: Path) -> Path:
    """Returns the path without `..`, relative to the working folder where it lies in it."""
    whole = path.resolve()
    return whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole


def say(console: Console, line: str) -> None:
    """Prints a line without wrapping, however narrow the terminal."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


# ---- before -----------------------------------------------------------------------------------------------------


def add_tenants(
    trainer: Trainer, config: SizedTrainConfig, opened: Opened, stage: Stage
) -> tuple[dict[str, Job], Sequence[str]]:
    """Reads every tenant's files and gives it a slot, from its checkpoint if it has one.

    stage: is told which file of how many is read.  Returns the jobs by tenant, and what is to be said of the files.
    """
    jobs, notes, numbers = {}, [], itertools.count(1)
    files = sum(1 if section.heldout is None else 2 for section in config.tenant)
    for section in config.tenant:
        limit = LengthLimit(lane_tokens=trainer.lane_tokens, too_long=section.too_long, measured=True)

        def read(path: Path, section: TenantSection = section, limit: LengthLimit = limit) -> Sequence[Unit]:
            stage.at(next(numbers), files)
            loaded = load_file(path, opened.tokenizer, limit=limit, loss=section.loss)
            if loaded.note is not None:
                notes.append(f"{section.name}: {path.name}: {loaded.note}")
            return loaded.units

        examples = read(section.train)
        heldout = [] if section.heldout is None else read(section.heldout)
        identity: dict[str, object] = {
            "base": trainer.base_hash,
            "spec": section.spec.to_json(),
            "seed": section.seed,
            "examples": digest(examples),
            "loss": {"name": section.loss} | section.objective.row(),
            "moments": trainer.moments,
            "pool": [[b.rank for b in trainer.seats.buckets], list(trainer.seats.buckets[0].targets)],
        }
        job = jobs[section.name] = Job(config.out / section.name, heldout, identity)
        check_identity(section.name, job)
        job.read_delivery()
        add_tenant(trainer, config, section, examples, job)
    return jobs, notes


def check_identity(name: str, job: Job) -> None:
    """Raises ConfigInvalid when the tenant's newest checkpoint was made from another identity."""
    saved = read_meta(job.states)
    differs = [] if saved is None else [key for key in IDENTITY if saved.get(key) != job.identity[key]]
    if differs:
        raise ConfigInvalid(
            f"tenant {name}: the checkpoint in {job.states} was made with another "
            f"{', another '.join(IDENTITY[key] for key in differs)}; change that back, name another `out`, "
            f"or remove {job.folder} to train anew"
        )


def add_tenant(
    trainer: Trainer, config: SizedTrainConfig, section: TenantSection, examples: Sequence[Unit], job: Job
) -> None:
    """Adds the tenant to the trainer, with its newest checkpoint if it has one."""
    name, spec = section.name, section.spec
    steps = math.ceil(PASSES * len(examples) / section.batch) if config.steps is None else config.steps
    optimizer = section.optimizer(default_steps=steps, default_lr=default_lr(trainer.base.config))
    try:
        state, step, cursor = trainer.fresh(spec, section.seed), 0, 0
        found = restore_state(job.states, state)
        if found is not None:
            assert isinstance(found.arrays, SlotState)
            state, step, cursor = found.arrays, found.step, int(found.meta["cursor"])
            job.saved = step
        trainer.add(
            name,
            spec,
            optimizer,
            examples,
            batch_size=section.batch,
            seed=section.seed,
            loss=section.objective,
            resume=(state, step, cursor),
        )
    except InvalidRequest as e:
        raise InvalidRequest(f"tenant {name}: {e.message}", param=e.param) from e


def evaluate_all(trainer: Trainer, jobs: dict[str, Job], names: Sequence[str], *, tuned: bool) -> dict[str, Evaluation]:
    """Returns held-out results of the tenants with held-out examples, under their adapters or the base alone."""
    names = [name for name in names if jobs[name].heldout]
    work = [(jobs[name].heldout, name) for name in names]
    return dict(zip(names, trainer.evaluate_all(work, tuned=tuned), strict=True))


def asked(trainer: Trainer, jobs: dict[str, Job], told: Progress, *, tuned: bool) -> dict[str, Evaluation]:
    """Returns `evaluate_all` of every tenant, as a stage where there is something to ask."""
    if not any(job.heldout for job in jobs.values()):
        return {}
    with told.stage(f"asking the {'adapters' if tuned else 'base model'} for the held-out examples"):
        return evaluate_all(trainer, jobs, list(jobs), tuned=tuned)


# ---- steps ------------------------------------------------------------------------------------------------------


def run_steps(
    trainer: Trainer,
    config: SizedTrainConfig,
    opened: Opened,
    jobs: dict[str, Job],
    store: AdapterStore | None,
    console: Console,
    told: Progress,
    screen: ProgressScreen,
) -> None:
    """Runs steps until every tenant is done or has failed; writes progress lines, metrics, checkpoints and adapters.

    A tenant's held-out examples are evaluated at each checkpoint and when it is done.  Where no table can move, lines
    say how far all are, and each tenant at its checkpoints and now and then.
    Raises KeyboardInterrupt after a Ctrl-C, when the step is finished and every state is saved.
    """
    for name, job in jobs.items():
        tenant = trainer.tenants[name]
        if tenant.status == "done" and job.delivered != tenant.step:
            deliver(trainer, name, job, opened, store)
    stopped, in_lines, steps = False, not moves(sys.stdout), 0
    with (
        event_files(trainer, jobs) if store is not None else contextlib.nullcontext({}) as events,
        ctrl_c_waits() as stop_requested,
        Live(screen.table(), console=console, refresh_per_second=4) as live,
        (told if in_lines else Progress(None)).stage("training", of=steps_left(trainer), unit="steps") as stage,
    ):
        while trainer.has_work and not (stopped := multihost.any_says(stop_requested.is_set())):
            reports = trainer.step()
            steps += len(reports)
            stage.at(steps)
            marks = [
                r.tenant
                for r in reports
                if r.step % config.save_every == 0 or trainer.tenants[r.tenant].status == "done"
            ]
            for name, evaluation in evaluate_all(trainer, jobs, marks, tuned=True).items():
                screen.note_heldout(name, evaluation.nll)
                if store is not None:
                    metrics.append_heldout(jobs[name].heldout_losses, trainer.tenants[name].step, evaluation)
            for report in reports:
                name, job = report.tenant, jobs[report.tenant]
                screen.note(report)
                if store is not None:
                    metrics.append(job.metrics, report)
                    events[name].add(metrics.row_of(report))
                if trainer.tenants[name].status == "done":
                    deliver(trainer, name, job, opened, store)
                elif name in marks:
                    save_tenant(trainer, name, job)
                if in_lines and (name in marks or screen.is_due(name)):
                    say(console, screen.line(name))
            live.update(screen.table())
        stage.at(steps, steps)
        for name, job in jobs.items():
            save_tenant(trainer, name, job)
    multihost.meet()
    if stopped:
        draw(config, jobs)
        say(console, f"stopped; every state is saved in {config.out}, and the same command goes on from there")
        raise KeyboardInterrupt


def steps_left(trainer: Trainer) -> int:
    """Returns how many steps all tenants together have before them."""
    return sum(t.optimizer.total_steps - t.step for t in trainer.tenants.values() if t.status == "running")


@contextlib.contextmanager
def event_files(trainer: Trainer, jobs: dict[str, Job]) -> Generator[dict[str, EventFile]]:
    """Opens the event files of the tenants that train, with the rows of their metrics files; closes them at the end."""
    with contextlib.ExitStack() as files:
        events = {}
        for name, job in jobs.items():
            if trainer.tenants[name].status == "running":
                events[name] = EventFile(job.folder / "tensorboard", metrics.rows(job.metrics))
                files.callback(events[name].close)
        yield events


@contextlib.contextmanager
def ctrl_c_waits() -> Generator[threading.Event]:
    """Yields an event that the first Ctrl-C sets without interrupting a step.  The second Ctrl-C interrupts."""
    stop_requested = threading.Event()

    def note(signum: int, frame: object) -> None:
        if stop_requested.is_set():
            raise KeyboardInterrupt
        stop_requested.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop_requested
    finally:
        signal.signal(signal.SIGINT, before)


def save_tenant(trainer: Trainer, name: str, job: Job) -> None:
    """Writes the tenant's training state as a new numbered checkpoint, unless that step exists."""
    tenant = trainer.tenants[name]
    if tenant.step and tenant.step != job.saved:
        state = jax.device_get(trainer.unseat(name))  # in every process: it is a program of the whole mesh
        if multihost.is_lead():
            save_state(job.states, tenant.step, state, job.identity | {"cursor": tenant.stream.cursor})
        job.saved = tenant.step


def deliver(trainer: Trainer, name: str, job: Job, opened: Opened, store: AdapterStore | None) -> None:
    """Adds the tenant's adapter to the store as a version, writes its PEFT folder, then saves its last state."""
    weights, version = trainer.adapter(name), 1  # in every process, as below
    if store is not None:
        ref = store.add(name, name, weights)
        store.flush()
        version = ref.version
        export_peft(weights.named(ref), job.folder / "peft", opened.base.config, base_name=opened.name, replace=True)
    save_tenant(trainer, name, job)
    job.delivered, job.version = trainer.tenants[name].step, version
    if store is not None:
        written = {"step": job.delivered, "version": job.version}
        replace_file(job.folder / "adapter.json", json.dumps(written).encode())


# ---- after ------------------------------------------------------------------------------------------------------


def draw(config: TrainConfig, jobs: dict[str, Job]) -> None:
    """Writes the pictures of all losses so far."""
    if multihost.is_lead():
        write_pictures({name: job.curves() for name, job in jobs.items()}, config.out)


def finish(
    trainer: Trainer,
    config: SizedTrainConfig,
    jobs: dict[str, Job],
    console: Console,
    told: Progress,
    before: dict[str, Evaluation],
) -> None:
    """Writes the pictures and the table of held-out results.  Raises StateInvalid, naming the tenants that failed."""
    with told.stage("drawing the loss curves"):
        draw(config, jobs)
    after = asked(trainer, jobs, told, tuned=True)
    columns = ("tenant", "status", "loss: base", "adapter", "accuracy: base", "adapter", "version")
    table = Table(*columns, title="held-out examples, by token (dpo: by pair)")
    for name, tenant in trainer.tenants.items():
        numbers = ["", "", "", ""]
        if name in after:
            b, a = before[name], after[name]
            numbers = [f"{b.nll:.3f}", f"{a.nll:.3f}", f"{b.accuracy:.0%}", f"{a.accuracy:.0%}"]
        version = str(jobs[name].version) if tenant.status == "done" else ""
        table.add_row(name, tenant.status, *numbers, version)
    console.print(table)
    for size, names in by_size(trainer).items():
        say(console, f"{', '.join(names)}: {size}")
    say(console, f"adapters: {config.out}/TENANT/peft; loss curves: {config.out}/loss.png and loss.svg")
    say(console, f"to serve them: jaxlora serve --model {config.model.path} --adapters {config.out}/store")
    multihost.meet()
    failed = [name for name, tenant in trainer.tenants.items() if tenant.status == "failed"]
    if failed:
        raise StateInvalid(
            f"{', '.join(failed)} failed: {MAX_BAD_STEPS} updates in a row were not finite and were skipped; "
            "lower lr or look at the weights in the train file, then run the same command again"
        )


def by_size(trainer: Trainer) -> dict[AdapterSize, list[str]]:
    """Returns the tenants whose adapters are of each size, in the order of the file."""
    groups: dict[AdapterSize, list[str]] = {}
    for name, tenant in trainer.tenants.items():
        groups.setdefault(adapter_size(trainer.base.config, tenant.spec), []).append(name)
    return groups
