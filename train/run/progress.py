"""Progress of a training run: a table of all tenants on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from rich.table import Table

from train.trainer import StepReport, Tenant

LINE_S = 30.0  # between two lines of one tenant where no table moves, checkpoints aside


class ProgressScreen:
    """Collects the newest numbers and the speed of each tenant, and renders them."""

    def __init__(
        self,
        tenants: Mapping[str, Tenant],
        heldout: Mapping[str, float],
        clock: Callable[[], float] = time.perf_counter,
    ):
        """heldout: held-out losses that are known from the start.  clock: returns seconds."""
        self._tenants, self._clock = tenants, clock
        self._heldout = dict(heldout)
        self._reports: dict[str, StepReport] = {}
        self._tokens: Counter[str] = Counter()
        self._took_s: dict[str, float] = {}  # from the start to the tenant's newest step
        self._told_s: dict[str, float] = {}  # from the start to the step of its newest line
        self._start_s = clock()

    def note(self, report: StepReport) -> None:
        """Records one more step of a tenant."""
        self._reports[report.tenant] = report
        self._tokens[report.tenant] += report.tokens
        self._took_s[report.tenant] = self._clock() - self._start_s

    def note_heldout(self, name: str, loss: float) -> None:
        """Records a held-out loss of the tenant's present weights."""
        self._heldout[name] = loss

    def _speed(self, name: str) -> str:
        """Returns the tenant's tokens per second since the start."""
        return f"{self._tokens[name] / max(self._took_s[name], 1e-9):.0f}"

    def _heldout_loss(self, name: str) -> str:
        return f"{self._heldout[name]:.3f}" if name in self._heldout else ""

    def is_due(self, name: str) -> bool:
        """Returns whether the tenant's newest step is so long after that of its last line that it is worth another."""
        return self._took_s[name] - self._told_s.get(name, 0.0) >= LINE_S

    def line(self, name: str) -> str:
        """Returns the tenant's newest step as a line of a log."""
        self._told_s[name] = self._took_s[name]
        report, heldout = self._reports[name], self._heldout_loss(name)
        words = [f"{progress(self._tenants[name])}, loss {report.loss:.3f}"]
        words += [f"held-out {heldout}"] if heldout else []
        return ", ".join([*words, f"{self._speed(name)} tokens/s"])

    def table(self) -> Table:
        """Returns a table of all tenants as they are now."""
        running = any(tenant.status == "running" for tenant in self._tenants.values())
        caption = "Ctrl-C finishes the step, saves every state and stops" if running else None
        table = Table(caption=caption, collapse_padding=True, pad_edge=False)  # fits 80 columns
        table.add_column("tenant", overflow="fold")
        for column in ("step", "loss", "accuracy", "held-out", "lr", "grad norm", "tokens/s", "status"):
            table.add_column(column, no_wrap=column != "grad norm")
        for name, tenant in self._tenants.items():
            cells = ["", "", self._heldout_loss(name), "", "", ""]
            if name in self._reports:
                r = self._reports[name]
                cells[:2] = f"{r.loss:.3f}", f"{r.accuracy:.0%}"
                cells[3:] = f"{r.lr:.1e}", f"{r.grad_norm:.2f}", self._speed(name)
            table.add_row(name, f"{tenant.step}/{tenant.optimizer.total_steps}", *cells, tenant.status)
        return table


def progress(tenant: Tenant) -> str:
    """Returns how far a tenant is, as text."""
    return f"{tenant.name}: step {tenant.step} of {tenant.optimizer.total_steps}"
