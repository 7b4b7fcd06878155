"""`jaxlora train CONFIG.toml`: every tenant of a file trains together; states, metrics, adapters and a plot land in `out`.

out/TENANT/state/    Orbax checkpoints of its training state; a second run goes on from the newest
out/TENANT/peft/     the trained adapter as a PEFT folder
out/TENANT/metrics.csv
out/store/           adapter versions, for `jaxlora serve`
out/loss.png
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.live import Live
from rich.table import Table

from jaxlora import compile_cache
from jaxlora.checkpoint import restore_state, save_state
from jaxlora.config import TenantSection, TrainConfig, load
from jaxlora.errors import ConfigInvalid
from jaxlora.lora import HEAD_TARGET, LAYER_TARGETS
from jaxlora.opened import Opened, open_base
from jaxlora.peft import export_peft
from jaxlora.pool import PoolSpec
from jaxlora.store import AdapterStore
from train.data import Example, load_jsonl
from train.optimizer import Optimizer
from train.plot import plot_losses
from train.step import SlotState
from train.trainer import Evaluation, StepReport, Trainer

HOST_BYTES = 2**30  # of adapter versions kept in RAM
COLUMNS = ("step", "loss", "accuracy", "lr", "grad_norm", "tokens", "finite")


def main(config_path: Path) -> None:
    """Trains all tenants of the file to their last step and writes `out`.

    Raises ConfigInvalid, DataInvalid, ModelInvalid or AdapterInvalid, before anything is written.
    """
    compile_cache.enable(None)
    config = load(config_path, TrainConfig)
    if len(config.tenant) > config.slots:
        raise ConfigInvalid(f"{len(config.tenant)} tenants need as many slots, the file has slots = {config.slots}")
    console = Console()
    opened = open_base(config.model, config.mesh)
    trainer = make_trainer(config, opened)
    heldout = seat_tenants(trainer, config, opened)
    with console.status("compiling the step"):
        trainer.warm_up()
    before = evaluate_all(trainer, heldout, tuned=False)
    run_steps(trainer, config, console)
    finish(trainer, config, opened, console, heldout, before)


def make_trainer(config: TrainConfig, opened: Opened) -> Trainer:
    """A trainer of the file's sizes, with a head target only where a tenant wants one."""
    wanted = {target for tenant in config.tenant for target in tenant.targets}
    targets = LAYER_TARGETS + ((HEAD_TARGET,) if HEAD_TARGET in wanted else ())
    spec = PoolSpec(slots=config.slots, rank=config.max_rank, dtype="float32", targets=targets)
    return Trainer(
        opened.base,
        opened.mesh,
        spec,
        lanes=config.lanes,
        lane_tokens=config.lane_tokens,
        base_hash=opened.base_hash,
    )


def seat_tenants(trainer: Trainer, config: TrainConfig, opened: Opened) -> dict[str, list[Example]]:
    """Reads every tenant's files, seats it (from its checkpoint if it has one); returns the held-out examples."""
    heldout = {}
    limit = config.lane_tokens + 1
    for section in config.tenant:
        examples = load_jsonl(section.train, opened.tokenizer, max_tokens=limit)
        if section.heldout is not None:
            heldout[section.name] = load_jsonl(section.heldout, opened.tokenizer, max_tokens=limit)
        optimizer = optimizer_of(section, config.steps)
        trainer.add(section.name, section.spec, optimizer, examples, batch_size=section.batch, seed=section.seed)
        _resume(trainer, config, section, optimizer, examples)
    return heldout


def optimizer_of(section: TenantSection, run_steps: int) -> Optimizer:
    """The tenant's optimizer; its schedule ends at its own last step, or the run's."""
    return Optimizer(
        lr=section.lr,
        schedule=section.schedule,
        warmup_steps=section.warmup_steps,
        total_steps=section.steps if section.steps is not None else run_steps,
        weight_decay=section.weight_decay,
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        clip=section.clip,
    )


def _resume(
    trainer: Trainer, config: TrainConfig, section: TenantSection, optimizer: Optimizer, examples: Sequence[Example]
) -> None:
    found = restore_state(_state_folder(config, section.name), trainer.unseat(section.name))
    if found is None:
        return
    if found.meta["spec"] != section.spec.to_json():
        raise ConfigInvalid(
            f"tenant {section.name}: the checkpoint in {config.out} has another rank, alpha or targets; "
            "use another `out` or the old settings"
        )
    assert isinstance(found.arrays, SlotState)
    trainer.remove(section.name)
    trainer.add(
        section.name,
        section.spec,
        optimizer,
        examples,
        batch_size=section.batch,
        seed=section.seed,
        resume=(found.arrays, found.step, int(found.meta["cursor"])),
    )


def _state_folder(config: TrainConfig, tenant: str) -> Path:
    return (config.out / tenant / "state").absolute()


def save_tenant(trainer: Trainer, config: TrainConfig, name: str) -> None:
    """Writes the tenant's training state as one more numbered checkpoint, unless that step is there."""
    tenant = trainer.tenants[name]
    folder = _state_folder(config, name)
    if tenant.step and not (folder / str(tenant.step)).exists():
        meta = {"spec": tenant.spec.to_json(), "cursor": tenant.stream.cursor}
        save_state(folder, tenant.step, jax.device_get(trainer.unseat(name)), meta)


def run_steps(trainer: Trainer, config: TrainConfig, console: Console) -> None:
    """Steps until every tenant is done or has failed, with a line per tenant, metrics files and checkpoints."""
    last: dict[str, StepReport] = {}
    for name in trainer.tenants:
        (config.out / name).mkdir(parents=True, exist_ok=True)
    with Live(_table(trainer, last), console=console, refresh_per_second=4) as live:
        while trainer.has_work:
            for report in trainer.step():
                last[report.tenant] = report
                _write_metrics(config.out / report.tenant / "metrics.csv", report)
                if report.step % config.save_every == 0:
                    save_tenant(trainer, config, report.tenant)
            live.update(_table(trainer, last))


def _write_metrics(path: Path, report: StepReport) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        writer.writerow([getattr(report, column) for column in COLUMNS])


def _table(trainer: Trainer, last: dict[str, StepReport]) -> Table:
    table = Table("tenant", "step", "loss", "accuracy", "lr", "grad norm", "status")
    for name, tenant in trainer.tenants.items():
        r = last.get(name)
        numbers = (
            ("", "", "", "")
            if r is None
            else (f"{r.loss:.3f}", f"{r.accuracy:.0%}", f"{r.lr:.1e}", f"{r.grad_norm:.2f}")
        )
        table.add_row(name, f"{tenant.step}/{tenant.optimizer.total_steps}", *numbers, tenant.status)
    return table


def evaluate_all(trainer: Trainer, heldout: dict[str, list[Example]], *, tuned: bool) -> dict[str, Evaluation]:
    """Held-out loss and accuracy of every tenant that has held-out examples, with its adapter or of the base alone."""
    work = [(examples, name if tuned else None) for name, examples in heldout.items()]
    return dict(zip(heldout, trainer.evaluate_all(work), strict=True))


def finish(
    trainer: Trainer,
    config: TrainConfig,
    opened: Opened,
    console: Console,
    heldout: dict[str, list[Example]],
    before: dict[str, Evaluation],
) -> None:
    """Last checkpoints, adapter versions, PEFT folders, the plot and the table of held-out results."""
    store = AdapterStore(config.out / "store", host_bytes=HOST_BYTES)
    after = evaluate_all(trainer, heldout, tuned=True)
    table = Table("tenant", "status", "held-out NLL base", "adapter", "token accuracy base", "adapter", "version")
    for name, tenant in trainer.tenants.items():
        save_tenant(trainer, config, name)
        version = ""
        if tenant.status == "done":
            adapter = trainer.adapter(name, store.mint(name, name))
            store.put(adapter)
            folder = config.out / name / "peft"
            shutil.rmtree(folder, ignore_errors=True)
            export_peft(adapter, folder, opened.base.config, base_name=opened.name)
            version = str(adapter.ref.version)
        numbers = ["", "", "", ""]
        if name in heldout:
            b, a = before[name], after[name]
            numbers = [f"{b.nll:.3f}", f"{a.nll:.3f}", f"{b.accuracy:.0%}", f"{a.accuracy:.0%}"]
        table.add_row(name, tenant.status, *numbers, version)
    store.close()
    plot_losses({name: tenant.losses for name, tenant in trainer.tenants.items()}, config.out / "loss.png")
    console.print(table)
    console.print(
        f"adapters: {config.out}/TENANT/peft; serve them with their store: jaxlora serve --adapters {config.out}/store"
    )
