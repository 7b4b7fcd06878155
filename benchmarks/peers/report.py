"""The samples as Markdown: medians, ratios of runs side by side, waiting times, memory, and who was skipped."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.cases import Sample
from serve.bench.report import percentile

OURS, TRAINER = "jaxlora", "jaxlora-trainer"  # what the ratios are of
OURS_IN = {"llama.cpp-q8_0": "jaxlora-int8"}  # but of these where it was measured: both in 8 bits
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
    alike = _of(samples, OURS_IN.get(peer, ""), case)
    ours = alike or [*_of(samples, OURS, case), *_of(samples, TRAINER, case)]
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


def _share(found: float | None) -> str:
    return "–" if found is None else f"{found:.2f}"


def _times(samples: list[Sample], field: Callable[[Sample], list[float]]) -> str:
    times_s = [t for s in samples for t in field(s)]
    return f"{percentile(times_s, 50) * MS:.0f} / {percentile(times_s, 99) * MS:.0f}" if times_s else "–"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run of the harness, for its tables."""

    about: Mapping[str, object]  # the machine, the date, the command
    versions: Mapping[str, str]  # of each peer that was there
    skipped: Mapping[str, str]  # why others were not
    samples: Sequence[Sample]

    def _document(self, parts: Sequence[str]) -> str:
        about = "\n".join(f"- {key}: {value}" for key, value in self.about.items())
        versions = "\n".join(f"- {peer}: {told}" for peer, told in self.versions.items())
        skipped = "\n".join(f"- {peer}: {why}" for peer, why in self.skipped.items())
        end = [f"### Skipped\n\n{skipped}"] if skipped else []
        return "\n\n".join([about, versions, others_told(self.samples), *parts, *end]) + "\n"

    def markdown(self) -> str:
        """Returns what the peers made of the cases."""
        samples = self.samples
        peers = [peer for peer in self.versions if any(s.peer == peer for s in samples)]
        others = [peer for peer in peers if peer not in (OURS, TRAINER)]
        parts = []

        def grid(title: str, cell: Callable[[str, str], str], rows: Sequence[str] = peers) -> None:
            if rows:
                parts.append(f"### {title}\n\n{_grid(samples, rows, cell)}")

        def ratio(title: str, value: Callable[[Sample], float]) -> None:
            title = f"Ours / theirs, {title}: median of the rounds (quartiles)"
            grid(title, lambda p, c: _ratio(paired_ratios(samples, p, c, value)), others)

        grid("Tokens a second", lambda p, c: _median([s.tokens_s for s in _of(samples, p, c)], ".0f"))
        grid("Tokens a CPU second", lambda p, c: _median([s.tokens_cpu_s for s in _of(samples, p, c)], ".0f"))
        ratio("tokens a second", lambda s: s.tokens_s)
        ratio("tokens a CPU second", lambda s: s.tokens_cpu_s)
        grid("First token, ms, p50 / p99", lambda p, c: _times(_of(samples, p, c), lambda s: s.first_s))
        grid("Between tokens, ms, p50 / p99", lambda p, c: _times(_of(samples, p, c), lambda s: s.between_s))
        grid("Peak memory, GB", lambda p, c: _median([s.peak_bytes / GB for s in _of(samples, p, c)], ".2f"))
        grid(f"Answers whose first {AGREE} characters are ours", lambda p, c: _share(agreement(samples, p, c)), others)
        return self._document(parts)

    def teams_markdown(self, processes: int) -> str:
        """Returns what TEAMS teams take: one server of ours, or a process each, of which `processes` were measured."""
        rows, ours = [], None
        for peer in _names(self.samples, lambda s: s.peer):
            own = [s for s in self.samples if s.peer == peer]
            shared = statistics.median(s.shared_bytes for s in own)
            private = statistics.median(s.private_bytes for s in own)
            whole = private + shared if peer == OURS else TEAMS * private / processes + shared
            speed = statistics.median(s.tokens_cpu_s for s in own)
            ours = (whole, speed) if peer == OURS else ours
            ratios = ["–", "–"] if ours is None else [f"{ours[0] / whole:.3f}", f"{ours[1] / speed:.2f}"]
            rows.append([peer, *(f"{n / GB:.2f}" for n in (private, shared, whole)), f"{speed:.1f}", *ratios])
        head = ["", "private GB", "shared GB", f"GB for {TEAMS} teams", "tokens a CPU second"]
        head += ["ours / theirs, memory", "ours / theirs, tokens"]
        note = f"A process a team: {processes} measured at once; for {TEAMS}, private memory x {TEAMS} / {processes}, shared once."
        return self._document([f"### {TEAMS} teams, one request each at a time\n\n{table(head, rows)}\n\n{note}"])
