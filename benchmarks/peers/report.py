"""The samples as Markdown: medians, ratios of runs side by side, waiting times, memory, and who was skipped."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.peers.cases import Sample
from serve.bench.report import percentile

OURS = "jaxlora"  # what the ratios are of: it, or its trainer
GB, MS = 1e9, 1e3
TEAMS = 32
DISTURBED = 0.1  # cores
AGREE = 12  # characters: two or three tokens; later ones part where two tokens are nearly as likely


def machine() -> dict[str, object]:
    """Returns what is said of the machine."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(re.findall(r"^(.+?)\s*: (.*)$", info.split("\n\n")[0], re.M))
    flags = set(fields.get("flags", "").split())
    kinds = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "cpu": fields.get("model name", platform.processor()),
        "instructions": [kind for kind in kinds if kind in flags],
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _names(samples: Sequence[Sample], field: Callable[[Sample], str]) -> list[str]:
    return list(dict.fromkeys(map(field, samples)))


def _of(samples: Sequence[Sample], peer: str, case: str) -> list[Sample]:
    return [s for s in samples if s.peer == peer and s.case == case]


def _grid(samples: Sequence[Sample], peers: Sequence[str], cell: Callable[[str, str], str]) -> str:
    """A row for each peer, a column for each case."""
    cases = _names(samples, lambda s: s.case)
    return table(["", *cases], [[peer, *(cell(peer, case) for case in cases)] for peer in peers])


def paired_ratios(samples: Sequence[Sample], peer: str, case: str, value: Callable[[Sample], float]) -> list[float]:
    """Returns ours / the peer's, for each round that has both."""
    theirs = {s.round: value(s) for s in _of(samples, peer, case)}
    ours = [s for s in samples if s.case == case and s.peer.split("-")[0] == OURS and "float32" not in s.peer]
    return [value(s) / theirs[s.round] for s in ours if s.round in theirs]


def others_told(samples: Sequence[Sample]) -> str:
    """Returns how much the rest of the machine worked beside the samples."""
    cores = [s.others_cpu_s / s.wall_s for s in samples] or [0.0]
    disturbed = sum(c > DISTURBED for c in cores)
    return (
        f"Beside the samples other processes kept {statistics.median(cores):.2f} cores busy (median; most {max(cores):.2f}); "
        f"{disturbed} of {len(cores)} samples had more than {DISTURBED} beside them."
    )


def agreement(samples: Sequence[Sample], peer: str, case: str) -> float | None:
    """Returns the share of requests whose answer begins with the same characters as ours; None: nothing to compare."""
    pairs = []
    for theirs in _of(samples, peer, case):
        for ours in _of(samples, OURS, case):
            if ours.round == theirs.round and theirs.texts:
                pairs += [a[:AGREE] == b[:AGREE] for a, b in zip(ours.texts, theirs.texts, strict=True)]
    return sum(pairs) / len(pairs) if pairs else None


def _median(cells: list[float], form: str) -> str:
    return format(statistics.median(cells), form) if cells else "–"


def _ratio(ratios: list[float]) -> str:
    if not ratios:
        return "–"
    low, high = percentile(ratios, 25), percentile(ratios, 75)
    return f"**{statistics.median(ratios):.2f}** ({low:.2f}–{high:.2f})"


def _times(samples: list[Sample], field: Callable[[Sample], list[float]]) -> str:
    times_s = [t for s in samples for t in field(s)]
    return f"{percentile(times_s, 50) * MS:.0f} / {percentile(times_s, 99) * MS:.0f}" if times_s else "–"


def markdown(
    samples: Sequence[Sample], *, about: Mapping[str, object], versions: Mapping[str, str], skipped: Mapping[str, str]
) -> str:
    """Returns the report."""
    peers = _names(samples, lambda s: s.peer)
    others = [peer for peer in peers if peer.split("-")[0] != OURS or "float32" in peer]
    parts = ["\n".join(f"- {key}: {value}" for key, value in about.items())]
    parts.append("\n".join(f"- {peer}: {told}" for peer, told in versions.items()))
    parts.append(others_told(samples))

    def grid(title: str, cell: Callable[[str, str], str], rows: Sequence[str] = peers) -> None:
        if rows:
            parts.append(f"### {title}\n\n{_grid(samples, rows, cell)}")

    grid("Tokens a second", lambda p, c: _median([s.tokens_s for s in _of(samples, p, c)], ".0f"))
    grid("Tokens a CPU second", lambda p, c: _median([s.tokens_cpu_s for s in _of(samples, p, c)], ".0f"))
    grid(
        "Ours / theirs, tokens a second: median of the rounds (quartiles)",
        lambda p, c: _ratio(paired_ratios(samples, p, c, lambda s: s.tokens_s)),
        others,
    )
    grid(
        "Ours / theirs, tokens a CPU second",
        lambda p, c: _ratio(paired_ratios(samples, p, c, lambda s: s.tokens_cpu_s)),
        others,
    )
    grid("First token, ms, p50 / p99", lambda p, c: _times(_of(samples, p, c), lambda s: s.first_s))
    grid("Between tokens, ms, p50 / p99", lambda p, c: _times(_of(samples, p, c), lambda s: s.between_s))
    grid("Peak memory, GB", lambda p, c: _median([s.peak_bytes / GB for s in _of(samples, p, c)], ".2f"))
    shares = lambda p, c: "–" if (found := agreement(samples, p, c)) is None else f"{found:.2f}"  # noqa: E731
    grid(f"Answers whose first {AGREE} characters are ours", shares, others)
    if skipped:
        parts.append("### Skipped\n\n" + "\n".join(f"- {peer}: {why}" for peer, why in skipped.items()))
    return "\n\n".join(parts) + "\n"


def teams_markdown(samples: Sequence[Sample], processes: int) -> str:
    """Returns what 32 teams take: one server of ours, or a process each, of which `processes` were measured."""
    rows = []
    for peer in _names(samples, lambda s: s.peer):
        own = [s for s in samples if s.peer == peer]
        shared = statistics.median(s.shared_bytes for s in own)
        private = statistics.median(s.private_bytes for s in own)
        whole = private + shared if peer == OURS else TEAMS * private / processes + shared
        speed = statistics.median(s.tokens_cpu_s for s in own)
        rows.append([peer, f"{private / GB:.2f}", f"{shared / GB:.2f}", f"{whole / GB:.2f}", f"{speed:.1f}"])
    head = ["", "private GB, measured", "shared GB, measured", f"GB for {TEAMS} teams", "tokens a CPU second"]
    note = f"A process a team: {processes} measured at once; for {TEAMS}, private memory x {TEAMS} / {processes}, shared once."
    return f"### {TEAMS} teams, one request each at a time\n\n{table(head, rows)}\n\n{note}\n"
