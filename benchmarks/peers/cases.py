"""What every peer is asked to do, and what one measurement of it holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

PROMPT_TOKENS = 64
TRAIN_LANES, TRAIN_TOKENS, TRAIN_STEPS = 4, 128, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """Greedy requests, all with PROMPT_TOKENS tokens in and `answer` out, from clients that ask without a pause."""

    name: str
    clients: int
    adapters: int  # asked in turn; 0: the base
    requests: int
    answer: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Steps of AdamW on rank-16 adapters; a step has `tenants` x `lanes` rows of TRAIN_TOKENS tokens."""

    name: str
    tenants: int
    lanes: int  # of each tenant
    steps: int = TRAIN_STEPS


type Case = Serving | Training

CASES: tuple[Case, ...] = (
    Serving(name="base-1", clients=1, adapters=0, requests=2),
    Serving(name="base-8", clients=8, adapters=0, requests=8),
    Serving(name="base-32", clients=32, adapters=0, requests=32),
    Serving(name="32-over-1", clients=32, adapters=1, requests=32),
    Serving(name="8-over-8", clients=8, adapters=8, requests=8),
    Serving(name="32-over-16", clients=32, adapters=16, requests=32),
    Serving(name="32-over-32", clients=32, adapters=32, requests=32),
    Training(name="train-alone", tenants=1, lanes=TRAIN_LANES),
    Training(name="train-16", tenants=16, lanes=1),
)
# A team asks one request at a time: all of them one server, or each a process of its own.
TEAMS = Serving(name="teams", clients=32, adapters=32, requests=32)
TEAM = Serving(name="teams", clients=1, adapters=1, requests=1)


def shortened[C: Serving | Training](case: C, answer: int) -> C:
    """Returns the case with answers of so many tokens, and one step of training for a smoke run's few."""
    if isinstance(case, Serving):
        return replace(case, answer=answer)
    return replace(case, steps=min(case.steps, answer))


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a peer did of a case."""

    wall_s: float
    tokens: int  # generated, or trained
    first_s: list[float]  # from the request to its first token, of each request; none where nothing streams
    between_s: list[float]  # between two tokens of one request
    texts: list[str]  # of the answers, in the order of the requests
    failed: list[str]  # why requests failed


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One case of one peer in one round."""

    peer: str
    case: str
    round: int
    wall_s: float
    cpu_s: float  # of all processes of the peer
    client_cpu_s: float  # of the process that asks
    tokens: int
    tokens_s: float
    tokens_cpu_s: float
    peak_bytes: int  # resident, all processes of the peer, each at its peak
    private_bytes: int  # of those that no other process shares, at the end
    shared_bytes: int  # its part of those that others share, at the end
    first_s: list[float]
    between_s: list[float]
    texts: list[str]
    others_cpu_s: float  # of all other processes meanwhile: above some hundredths of wall_s it was not alone
