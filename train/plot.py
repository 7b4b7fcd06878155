"""The loss curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

Curve = tuple[Sequence[int], Sequence[float]]  # optimizer steps, and the loss of each


def plot_losses(losses: Mapping[str, Sequence[float]], path: Path) -> None:
    """As `plot_curves`, of losses from step 1 on."""
    plot_curves({name: (range(1, len(values) + 1), values) for name, values in losses.items()}, path)


def plot_curves(curves: Mapping[str, Curve], path: Path) -> None:
    """Writes one curve per tenant (mean loss per target token, nats, by optimizer step) as PNG or SVG, by the suffix."""
    import matplotlib  # a second to import, and only needed here

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, (steps, losses) in curves.items():
        axes.plot(steps, losses, label=name)
    axes.set(xlabel="optimizer step", ylabel="training loss, nats per token", yscale="log")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
