"""What each tenant may have: slots by weight, and tokens by a virtual counter.  Pure host code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

INPUT, OUTPUT = 1.0, 2.0  # cost of a token computed and of a token generated, as in the virtual token counter (VTC)


def quotas(demand: Mapping[str, int], weights: Mapping[str, float], slots: int) -> dict[str, int]:
    """Slots each tenant is due: its share by weight, never more than it can use, at least one.

    With more tenants than slots every tenant is due one, and they take turns.  demand: adapters with work.
    """
    due = {tenant: 1 for tenant, wanted in demand.items() if wanted > 0}
    for _ in range(slots - len(due)):
        short = [t for t in due if due[t] < demand[t]]
        if not short:
            break
        due[min(short, key=lambda t: ((due[t] + 1) / weights.get(t, 1.0), t))] += 1
    return due


class TokenShares:
    """The virtual token counter of each tenant: what it was served, over its weight (S-LoRA's fair queue, arXiv 2401.00588).

    Who has work and the smallest counter goes first.  A tenant that comes back starts at the smallest counter of those
    who are there: time without work is not saved up.
    """

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}
        self._served: dict[str, float] = {}

    def keep(self, tenants: Iterable[str]) -> None:
        """These have work: newcomers start with the least served of the others, and who left is forgotten."""
        there = {t: self._served[t] for t in tenants if t in self._served}
        least = min(there.values(), default=0.0)
        self._served = {t: there.get(t, least) for t in tenants}

    def add(self, tenant: str, inputs: int, outputs: int) -> None:
        """These many tokens were computed, and generated, for the tenant."""
        cost = (INPUT * inputs + OUTPUT * outputs) / self.weights.get(tenant, 1.0)
        self._served[tenant] = self._served.get(tenant, 0.0) + cost

    def served(self, tenant: str) -> float:
        """Weighted tokens; lower goes first."""
        return self._served.get(tenant, 0.0)
