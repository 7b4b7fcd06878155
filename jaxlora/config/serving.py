"""Settings of a server, each validated once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal, get_args

from jaxlora.config.base import ONE_DEVICE, Checks, Dtype, MeshSection, ModelSection
from jaxlora.config.cluster import ClusterSection
from jaxlora.config.toml import NoneIfFalse, TomlPath, TomlPathByDefault
from jaxlora.core.lora import check_name

READ_MEMORY_BYTES = 2 * 2**30  # to read one training file, where nothing else is said or planned
LogForm = Literal["human", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
KeysNeeded = Literal["auto", "required"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSection:
    """A PEFT folder to load when the server starts, and the model name it answers to."""

    name: str
    path: TomlPath

    def __post_init__(self) -> None:
        check_name(self.name, "name")


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantWeight:
    """A tenant's share of slots and tokens relative to the other tenants; a tenant that is not named has 1."""

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        with Checks() as check:
            check.call("name", lambda: check_name(self.name, "name"))
            check.positive(self, "weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """Settings that may change while the server runs."""

    quantum_ms: float = 200.0  # how long an adapter keeps its slot while others wait for one
    active_slots: int | None = None  # adapters active at once; None: as many as there are slots
    slots: int | None = None  # of slot_sizes, the one to stay at; None: whichever suits the load
    # Prompt chunks in a step that also decodes: fewer give steadier tokens, more give earlier first tokens and more
    # tokens in all.  None: as many as in a step of prompts alone.
    prefill_lanes_while_decoding: int | None = None
    # Adapters that are never evicted from their slots; of each the newest version, future ones included.
    pin: tuple[str, ...] = ()
    tenant: tuple[TenantWeight, ...] = ()

    def __post_init__(self) -> None:
        with Checks() as check:
            check.positive(self, "quantum_ms")
            plain = not any("@" in name for name in self.pin)
            check.need(plain, "pin", "names without @VERSION, as the newest is pinned", self.pin)
            check.distinct(self.pin, "names under pin", "pin[{}]")
            check.distinct([t.name for t in self.tenant], "names under [[tuning.tenant]]", "tenant[{}].name")

    @property
    def weights(self) -> dict[str, float]:
        """Returns the weights of the tenants that are named."""
        return {t.name: t.weight for t in self.tenant}

    def check_fits(self, slots: int | None, prefill_lanes: int | None, slot_sizes: Sequence[int] = ()) -> None:
        """Raises ValueError for more than a server of these sizes has; None: a size that is not known yet.

        Pinned adapters must have slots at the least of slot_sizes.
        """
        with Checks() as check:
            wanted = (
                f"one of slot_sizes = {list(slot_sizes)}" if slot_sizes else "left out where there are no slot_sizes"
            )
            check.need(self.slots is None or self.slots in slot_sizes, "slots", wanted, self.slots)
            most_slots = max(slot_sizes, default=slots)
            for name, most in (("active_slots", most_slots), ("prefill_lanes_while_decoding", prefill_lanes)):
                given, top = getattr(self, name), math.inf if most is None else most
                wanted = "at least 1" if most is None else f"in [1, {most}]"
                check.need(given is None or 1 <= given <= top, name, wanted, given)
            known = [n for n in (min(slot_sizes, default=slots), self.active_slots) if n is not None]
            active = min(known, default=None)
            if active is not None and len(self.pin) >= active >= 1:
                check.refuse(
                    "pin", f"pin takes at most {active - 1} adapters of {active} active slots, got {len(self.pin)}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantLimits:
    """Limits of one tenant.  None: as much as the server has."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompts and the tokens they may generate
    adapters: int | None = None
    adapter_bytes: int | None = None  # all versions of its adapters together
    file_bytes: int | None = None  # all its files together
    jobs: int | None = None  # jobs that have not ended
    open_requests: int | None = None  # being answered at once; None: half of all, and any number without keys
    uploads: int | None = 4  # files on their way in at once
    followers: int | None = 64  # streams of job events at once

    def __post_init__(self) -> None:
        with Checks() as check:
            check.counts(self, *(f.name for f in fields(TenantLimits)))


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedLimits(TenantLimits):
    """Limits of the tenant of this name, in place of the general ones."""

    name: str

    def __post_init__(self) -> None:
        with Checks() as check:
            check.call("", lambda: TenantLimits.__post_init__(self))
            check.call("name", lambda: check_name(self.name, "name"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitsSection(TenantLimits):
    """Limits of each tenant, and the tenants that have other limits."""

    max_file_bytes: int = 512 * 2**20  # limit of one file, for every tenant
    read_memory_bytes: int | None = None  # to read one file, in a process of its own; None: a small part of the memory
    read_cpu_s: float = 3600.0  # of processor time to read one file, of which a small one gets less
    keep_days: float = 7.0  # for which checkpoints of failed jobs stay, and what the database does not know
    json_bytes_per_second: int = 4 * 2**20  # of request bodies, for every tenant; uploads are not among them
    tenant: tuple[NamedLimits, ...] = ()

    def __post_init__(self) -> None:
        with Checks() as check:
            check.call("", lambda: TenantLimits.__post_init__(self))
            check.counts(self, "max_file_bytes", "read_memory_bytes", "json_bytes_per_second")
            check.positive(self, "read_cpu_s")
            check.need(0 <= self.keep_days < math.inf, "keep_days", "0 or more", self.keep_days)
            check.distinct([t.name for t in self.tenant], "names under [[limits.tenant]]", "tenant[{}].name")

    @property
    def keep_s(self) -> float:
        """Returns keep_days in seconds."""
        return self.keep_days * 86400

    def of(self, tenant: str) -> TenantLimits:
        """Returns the limits of one tenant."""
        return next((t for t in self.tenant if t.name == tenant), self)


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpSection:
    """Limits of connections, heads and bodies, whoever sends them."""

    connections: int = 10_000  # open at once; fewer where the process may have fewer file descriptors
    # Requests being answered at once for one address.  None: half of all, and any number for this machine.
    requests_per_address: int | None = None
    header_timeout_s: float = 10.0  # for a request's line and headers to arrive
    least_body_bytes_s: int = 4096  # pace below which a body is refused
    body_patience_s: float = 10.0  # after the server has waited so long beyond the time that its bytes may take

    def __post_init__(self) -> None:
        with Checks() as check:
            check.counts(self, "connections", "least_body_bytes_s", "requests_per_address")
            check.positive(self, "header_timeout_s", "body_patience_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSection:
    """Fine-tuning jobs that run beside serving, on the same device."""

    # Left out, these five are chosen from the device's memory and the base.
    slots: int | None = None  # adapters trained at once; other jobs wait in a queue
    lanes: int | None = None  # packed rows of one batch, each of one tenant
    lane_tokens: int | None = None  # tokens of a row
    # Tokens of the longest example: jobs with examples longer than a row get rows of 4, 16, … times its length, each of
    # which compiles programs of its own.  Left out beside a lane_tokens: that.
    longest_tokens: int | None = None
    max_rank: int | None = None  # of the adapters trained; at most the server's
    quantum_steps: int = 50  # steps after which a job gives its slot to a tenant that had less
    publish_every: int = 5  # steps between two published versions of a running job; `latest` refers to them
    call_tokens: int = 65_536  # most tokens that one call which trains at once (Gradient's fine-tune) may have

    def __post_init__(self) -> None:
        with Checks() as check:
            check.counts(self, "slots", "lanes", "lane_tokens", "longest_tokens", "max_rank")
            if self.lane_tokens is not None and self.longest_tokens is not None:
                wanted = f"at least lane_tokens = {self.lane_tokens}"
                check.need(self.longest_tokens >= self.lane_tokens, "longest_tokens", wanted, self.longest_tokens)
            check.counts(self, "quantum_steps", "publish_every", "call_tokens")


# The section, or `training = false` in a file, which is None here: no jobs.
Training = Annotated[TrainingSection | None, NoneIfFalse]


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionSection:
    """For how long the database keeps what no object depends on; a day for answers to requests with an Idempotency-Key."""

    job_events_days: float = 30.0  # after its end, the events of a job
    jobs_days: float = 90.0  # after its end, a job that made no version

    def __post_init__(self) -> None:
        with Checks() as check:
            check.positive(self, "job_events_days", "jobs_days")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlobsSection:
    """Object storage for adapters, files and checkpoints; this machine's disk then holds copies."""

    url: str  # such as s3://BUCKET/PREFIX, or a folder; used by one server only
    disk_gb: float | None = None  # limit of copies of adapters and files on this disk; None: copies are never evicted
    timeout_s: float = 30.0  # of one attempt, besides the time its bytes take

    def __post_init__(self) -> None:
        with Checks() as check:
            check.need(bool(self.url.strip()), "url", "an URL such as s3://BUCKET/PREFIX", self.url)
            check.positive(self, "disk_gb", "timeout_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankClassSection:
    """Slots for adapters of a smaller rank, which then use less device memory."""

    rank: int  # largest rank of such a slot; multiples of 8 are read best
    slots: int

    def __post_init__(self) -> None:
        with Checks() as check:
            check.counts(self, "rank", "slots")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Settings of one server: one base, many adapters, one compiled decode step."""

    model: ModelSection
    mesh: MeshSection = ONE_DEVICE
    host: str = "127.0.0.1"  # address to listen on; 127.0.0.1 is this machine only
    port: int = 8000  # 0: any free port
    memory_gb: float | None = None  # most memory of the device that the server may take; None: what is available
    memory_share: float = 0.9  # of that memory, what is planned with
    # Left out, these ten are chosen from that memory and the base.
    slots: int | None = None  # adapters on the device at once
    max_rank: int | None = None  # largest rank a slot holds
    rows: int | None = None  # sequences decoded in one step
    kv_pages: int | None = None  # pages of the key/value cache, all sequences together
    prefill_lanes: int | None = None  # prompt chunks in one prefill step; a long prompt takes several
    prefill_tokens: int | None = None  # tokens in a prompt chunk
    max_waiting_tokens: int | None = None  # limit of waiting requests' tokens, prompt and max_tokens together
    # Adapter versions in host memory: recently used, being read, on their way to the device.
    host_adapters_gb: float | None = None
    host_states_gb: float | None = None  # host memory for states of jobs without a slot; the others wait in files
    host_kv_gb: float | None = None  # host memory for the KV of preempted requests; KV that does not fit is recomputed
    # Numbers of slots, rising, among them `slots`, with which the server starts: where adapters wait for slots or
    # requests for KV pages, it changes to the next, and pages take the memory that slots leave.  None: no changes.
    slot_sizes: tuple[int, ...] = ()
    # More slots, for smaller ranks: an adapter lies in one of the smallest rank that holds it, in a larger one while
    # nobody else wants that.  Left out beside `slots`, a GPU or TPU chooses them at the start from the ranks in its store.
    rank_class: tuple[RankClassSection, ...] = ()
    page_tokens: int = 64  # tokens in a page; large pages are nearly free on a CPU, small ones are not
    default_max_tokens: int = 256  # of a request that sets none
    max_waiting: int = 256  # requests in the queue before new ones get 503
    # Longest time of a request, queueing included; one that is not complete then ends with an error.
    max_request_s: float = 3600.0
    grace_s: float = 30.0  # how long open requests may continue after a signal to stop
    adapters: TomlPathByDefault = Path("adapters")  # root of the adapter store
    data: TomlPathByDefault = Path("data")  # root of the server's own files: uploads, jobs, and the database unless set
    tuning: Tuning = Tuning()
    database: str | None = None  # SQLAlchemy's URL; None: SQLite in `data`
    blobs: BlobsSection | None = None  # None: all of it is on this machine only
    limits: LimitsSection = LimitsSection()
    http: HttpSection = HttpSection()
    # `required`: no start without keys; `auto`: the same where others than this machine can reach it.
    keys: KeysNeeded = "auto"
    retention: RetentionSection = RetentionSection()
    # With `training = false` at the top, in place of this section, the server takes no jobs.
    training: Training = TrainingSection()
    kv_dtype: Dtype = "auto"  # of keys and values; auto: the base's
    log: LogForm = "human"  # human, or one JSON object per line
    log_level: LogLevel = "info"  # the least that is logged; polls of health, metrics and stats are debug
    hang_s: float = 4.0  # longest time of one device step before /health returns 503; more for a slow machine
    metrics_open: bool = False  # /metrics needs no key; else one of the role admin
    metrics_adapters: bool = False  # /metrics names the adapters in the slots, for routers that route by them
    # Of an OTLP collector (extra `otel`), such as http://127.0.0.1:4318; None: no traces.
    otel_endpoint: str | None = None
    load: tuple[AdapterSection, ...] = field(default=())
    cluster: ClusterSection = ClusterSection()
    lora_roots: tuple[TomlPath, ...] = ()  # folders from which admins may load PEFT folders over HTTP; none: no loading

    def __post_init__(self) -> None:
        with Checks() as check:
            check.counts(
                self, "slots", "max_rank", "rows", "kv_pages", "page_tokens", "prefill_lanes", "prefill_tokens"
            )
            check.counts(self, "default_max_tokens", "max_waiting", "max_waiting_tokens")
            check.positive(self, "memory_gb", "host_adapters_gb")
            check.need(self.max_request_s > 0, "max_request_s", "positive", self.max_request_s)
            check.need(self.hang_s > 0, "hang_s", "positive", self.hang_s)
            check.need(0 < self.memory_share <= 1, "memory_share", "in (0, 1]", self.memory_share)
            check.need(self.grace_s >= 0, "grace_s", "0 or more", self.grace_s)
            for name in ("host_kv_gb", "host_states_gb"):
                value = getattr(self, name)
                check.need(value is None or 0 <= value < math.inf, name, "0 or more, or absent", value)
            processes = self.mesh.processes
            check.need(processes == 1, "mesh.processes", "1, as only training runs in several", processes)
            check.need(self.log in get_args(LogForm), "log", "human or json", self.log)
            levels = "debug, info, warning or error"
            check.need(self.log_level in get_args(LogLevel), "log_level", levels, self.log_level)
            check.need(self.keys in get_args(KeysNeeded), "keys", "auto or required", self.keys)
            check.need(bool(self.host.strip()), "host", "an address such as 127.0.0.1", self.host)
            check.need(0 <= self.port < 2**16, "port", "in [0, 65535]", self.port)
            check.distinct([a.name for a in self.load], "names under [[load]]", "load[{}].name")
            most, trained = self.max_rank, None if self.training is None else self.training.max_rank
            if most is not None and trained is not None:
                check.need(trained <= most, "training.max_rank", f"at most max_rank = {most}", trained)
            rising = sorted({n for n in self.slot_sizes if n >= 1}) == list(self.slot_sizes)
            check.need(rising, "slot_sizes", "rising numbers of slots, each at least 1", list(self.slot_sizes))
            among = not self.slot_sizes or self.slots in self.slot_sizes
            check.need(among, "slots", f"one of slot_sizes = {list(self.slot_sizes)}", self.slots)
            ranks = [c.rank for c in self.rank_class]
            check.distinct([str(rank) for rank in ranks], "ranks under [[rank_class]]", "rank_class[{}].rank")
            for i, rank in enumerate(ranks):
                less = most is None or rank < most
                check.need(less, f"rank_class[{i}].rank", f"less than max_rank = {most}", rank)
            single = not (self.slot_sizes and self.rank_class)
            check.need(single, "rank_class", "left out where there are slot_sizes", ranks)
            more = sum(c.slots for c in self.rank_class)
            sizes = None if self.slots is None else self.slots + more, self.prefill_lanes, self.slot_sizes
            check.call("", lambda: self.tuning.check_fits(*sizes), section="tuning.")

    @property
    def database_url(self) -> str:
        """Returns the URL of the database that records jobs, files and keys."""
        return database_in(self.data) if self.database is None else self.database


def database_in(data: Path) -> str:
    """Returns the URL of a server's own database, in its data folder."""
    return f"sqlite:///{data / 'jaxlora.sqlite'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotSize:
    """Slots and KV pages that lie in one piece of memory: more of one are fewer of the other."""

    slots: int
    pages: int


LONGER = 4  # times the length of the rows before


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedTraining(TrainingSection):
    """Fine-tuning jobs of a known size."""

    slots: int
    lanes: int
    lane_tokens: int
    longest_tokens: int
    max_rank: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Returns the lengths of rows, from the shortest on."""
        found = [self.lane_tokens]
        while found[-1] < self.longest_tokens:
            found.append(min(LONGER * found[-1], self.longest_tokens))
        return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedConfig(ServeConfig):
    """Settings of a server whose sizes are known: what it is built from."""

    slots: int
    max_rank: int
    rows: int
    kv_pages: int
    prefill_lanes: int
    prefill_tokens: int
    max_waiting_tokens: int
    host_adapters_gb: float
    host_kv_gb: float
    host_states_gb: float
    sizes: tuple[SlotSize, ...] = ()  # those of slot_sizes
    # Whether the server divides its slots into classes by the ranks in its store (model/slot_classes.py).
    classes_from_store: bool = False
    training: SizedTraining | None = None

    @property
    def rank_classes(self) -> tuple[tuple[int, int], ...]:
        """Returns (slots, rank) of each class of slots, the largest rank first."""
        smaller = sorted(((c.slots, c.rank) for c in self.rank_class), key=lambda c: -c[1])
        return (self.slots, self.max_rank), *smaller
