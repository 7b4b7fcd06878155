"""Settings of a server, each validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from jaxlora.config.base import ONE_DEVICE, Dtype, MeshSection, ModelSection, need, need_counts, need_distinct
from jaxlora.config.toml import TomlPath
from jaxlora.core.lora import check_name

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
    weight: float

    def __post_init__(self) -> None:
        check_name(self.name, "name")
        need(0 < self.weight < math.inf, "weight", "positive", self.weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """Settings that may change while the server runs."""

    quantum_ms: float  # how long an adapter keeps its slot while others wait for one
    active_slots: int | None = None  # adapters active at once; None: as many as there are slots
    # Prompt chunks in a step that also decodes: fewer give steadier tokens, more give earlier first tokens and more
    # tokens in all.  None: as many as in a step of prompts alone.
    prefill_lanes_while_decoding: int | None = None
    # Adapters that are never evicted from their slots; of each the newest version, future ones included.
    pin: tuple[str, ...] = ()
    tenant: tuple[TenantWeight, ...] = ()

    def __post_init__(self) -> None:
        need(0 < self.quantum_ms < math.inf, "quantum_ms", "positive", self.quantum_ms)
        need(
            not any("@" in name for name in self.pin),
            "pin",
            "names without @VERSION, as the newest is pinned",
            self.pin,
        )
        need_distinct(list(self.pin), "names under pin")
        need_distinct([t.name for t in self.tenant], "names under [[tuning.tenant]]")

    @property
    def weights(self) -> dict[str, float]:
        """Returns the weights of the tenants that are named."""
        return {t.name: t.weight for t in self.tenant}

    def check_fits(self, slots: int, prefill_lanes: int) -> None:
        """Raises ValueError for more than a server of these sizes has."""
        for name, most in (("active_slots", slots), ("prefill_lanes_while_decoding", prefill_lanes)):
            given = getattr(self, name)
            need(given is None or 1 <= given <= most, name, f"in [1, {most}]", given)
        active = self.active_slots or slots
        if len(self.pin) >= active:
            raise ValueError(f"pin takes at most {active - 1} adapters of {active} active slots, got {len(self.pin)}")


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
        for f in fields(TenantLimits):
            name, value = f.name, getattr(self, f.name)
            need(value is None or value >= 1, name, "at least 1, or absent", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedLimits(TenantLimits):
    """Limits of the tenant of this name, in place of the general ones."""

    name: str

    def __post_init__(self) -> None:
        TenantLimits.__post_init__(self)
        check_name(self.name, "name")


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitsSection(TenantLimits):
    """Limits of each tenant, and the tenants that have other limits."""

    max_file_bytes: int = 512 * 2**20  # limit of one file, for every tenant
    read_memory_bytes: int = 2 * 2**30  # to read one file, in a process of its own
    read_cpu_s: float = 3600.0  # of processor time to read one file, of which a small one gets less
    keep_days: float = 7.0  # for which checkpoints of failed jobs stay, and what the database does not know
    json_bytes_per_second: int = 4 * 2**20  # of request bodies, for every tenant; uploads are not among them
    tenant: tuple[NamedLimits, ...] = ()

    def __post_init__(self) -> None:
        TenantLimits.__post_init__(self)
        need_counts(self, "max_file_bytes", "read_memory_bytes", "json_bytes_per_second")
        need(0 < self.read_cpu_s < math.inf, "read_cpu_s", "positive", self.read_cpu_s)
        need(0 <= self.keep_days < math.inf, "keep_days", "0 or more", self.keep_days)
        need_distinct([t.name for t in self.tenant], "names under [[limits.tenant]]")

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
    least_body_bytes_s: int = 4096  # a body that comes more slowly is refused,
    body_patience_s: float = 10.0  # once the server has waited for it so long beyond the time its bytes may take

    def __post_init__(self) -> None:
        need_counts(self, "connections", "least_body_bytes_s")
        most = self.requests_per_address
        need(most is None or most >= 1, "requests_per_address", "at least 1, or absent", most)
        for name in ("header_timeout_s", "body_patience_s"):
            need(0 < getattr(self, name) < math.inf, name, "positive", getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSection:
    """Fine-tuning jobs that run beside serving, on the same device."""

    slots: int  # adapters trained at once; other jobs wait in a queue
    lanes: int  # packed rows of one batch, each of one tenant
    lane_tokens: int  # tokens of a row: the longest example
    quantum_steps: int = 50  # steps after which a job gives its slot to a tenant that had less
    publish_every: int = 5  # steps between two published versions of a running job; `latest` refers to them
    max_rank: int | None = None  # of the adapters trained; None: the server's
    call_tokens: int = 65_536  # most tokens that one call which trains at once (Gradient's fine-tune) may have

    def __post_init__(self) -> None:
        need(self.max_rank is None or self.max_rank >= 1, "max_rank", "at least 1", self.max_rank)
        need_counts(self, "slots", "lanes", "lane_tokens", "quantum_steps", "publish_every", "call_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionSection:
    """For how long the database keeps what no object depends on; a day for answers to requests with an Idempotency-Key."""

    job_events_days: float = 30.0  # after its end, the events of a job
    jobs_days: float = 90.0  # after its end, a job that made no version

    def __post_init__(self) -> None:
        for name in ("job_events_days", "jobs_days"):
            need(0 < getattr(self, name) < math.inf, name, "positive", getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class BlobsSection:
    """Object storage for adapters, files and checkpoints; this machine's disk then holds copies."""

    url: str  # such as s3://BUCKET/PREFIX, or a folder; used by one server only
    disk_gb: float | None = None  # limit of copies of adapters and files on this disk; None: copies are never evicted
    timeout_s: float = 30.0  # of one attempt, besides the time its bytes take

    def __post_init__(self) -> None:
        need(bool(self.url.strip()), "url", "an URL such as s3://BUCKET/PREFIX", self.url)
        need(self.disk_gb is None or 0 < self.disk_gb < math.inf, "disk_gb", "positive, or absent", self.disk_gb)
        need(0 < self.timeout_s < math.inf, "timeout_s", "positive", self.timeout_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Settings of one server: one base, many adapters, one compiled decode step."""

    model: ModelSection
    mesh: MeshSection = ONE_DEVICE
    host: str  # address to listen on; 127.0.0.1 is this machine only
    port: int  # 0: any free port
    slots: int  # adapters on the device at once
    max_rank: int  # largest rank a slot holds
    rows: int  # sequences decoded in one step
    kv_pages: int  # pages of the key/value cache, all sequences together
    page_tokens: int  # tokens in a page
    prefill_lanes: int  # prompt chunks in one prefill step
    prefill_tokens: int  # tokens in a prompt chunk
    default_max_tokens: int  # of a request that sets none
    max_waiting: int  # requests in the queue before new ones get 503
    max_waiting_tokens: int  # limit of their tokens, prompt and max_tokens together
    # Longest time of a request, queueing included; one that is not complete then ends with an error.
    max_request_s: float
    grace_s: float  # how long open requests may continue after a signal to stop
    host_adapters_gb: float  # adapter versions in host memory: recently used, being read, on their way to the device
    host_kv_gb: float  # host memory for the KV of preempted requests; KV that does not fit is recomputed
    adapters: TomlPath  # root of the adapter store
    data: TomlPath  # root of the server's own files: uploads, jobs, and the database unless `database` is set
    tuning: Tuning
    database: str | None = None  # SQLAlchemy's URL; None: SQLite in `data`
    blobs: BlobsSection | None = None  # None: the contents of `adapters` and `data` exist on this machine only
    limits: LimitsSection = LimitsSection()
    http: HttpSection = HttpSection()
    keys: KeysNeeded = (
        "auto"  # required: no start without keys; auto: the same where others than this machine can reach it
    )
    retention: RetentionSection = RetentionSection()
    training: TrainingSection | None = None  # None: no fine-tuning jobs
    kv_dtype: Dtype = "auto"  # of keys and values; auto: the base's
    log: LogForm = "human"  # human, or one JSON object per line
    log_level: LogLevel = "info"  # the least that is logged; polls of health, metrics and stats are debug
    hang_s: float = 4.0  # longest time of one device step before /health returns 503; more for a slow machine
    metrics_open: bool = False  # /metrics needs no key; else one of the role admin
    metrics_adapters: bool = False  # /metrics names the adapters in the slots, for routers that route by them
    # Of an OTLP collector (extra `otel`), such as http://127.0.0.1:4318; None: no traces.
    otel_endpoint: str | None = None
    load: tuple[AdapterSection, ...] = field(default=())
    lora_roots: tuple[TomlPath, ...] = ()  # folders from which admins may load PEFT folders over HTTP; none: no loading

    def __post_init__(self) -> None:
        need_counts(self, "slots", "max_rank", "rows", "kv_pages", "page_tokens", "prefill_lanes", "prefill_tokens")
        need_counts(self, "default_max_tokens", "max_waiting", "max_waiting_tokens")
        need(self.max_request_s > 0, "max_request_s", "positive", self.max_request_s)
        need(self.hang_s > 0, "hang_s", "positive", self.hang_s)
        need(self.grace_s >= 0, "grace_s", "0 or more", self.grace_s)
        need(self.host_adapters_gb > 0, "host_adapters_gb", "positive", self.host_adapters_gb)
        need(self.host_kv_gb >= 0, "host_kv_gb", "0 or more", self.host_kv_gb)
        need(self.mesh.processes == 1, "mesh.processes", "1, as only training runs in several", self.mesh.processes)
        need(self.log in get_args(LogForm), "log", "human or json", self.log)
        need(self.log_level in get_args(LogLevel), "log_level", "debug, info, warning or error", self.log_level)
        need(self.keys in get_args(KeysNeeded), "keys", "auto or required", self.keys)
        need(bool(self.host.strip()), "host", "an address such as 127.0.0.1", self.host)
        need(0 <= self.port < 2**16, "port", "in [0, 65535]", self.port)
        need_distinct([a.name for a in self.load], "names under [[load]]")
        if self.training is not None and self.training.max_rank is not None:
            most = self.max_rank
            need(
                self.training.max_rank <= most,
                "training.max_rank",
                f"at most max_rank = {most}",
                self.training.max_rank,
            )
        self.tuning.check_fits(self.slots, self.prefill_lanes)

    @property
    def database_url(self) -> str:
        """Returns the URL of the database that records jobs, files and keys."""
        return database_in(self.data) if self.database is None else self.database


def database_in(data: Path) -> str:
    """Returns the URL of a server's own database, in its data folder."""
    return f"sqlite:///{data / 'jaxlora.sqlite'}"


def serve_defaults(model: str, adapters: Path) -> ServeConfig:
    """Returns the settings of `jaxlora serve --model`, the one place of the server's defaults: this machine only.

    Sized for the demo model on a laptop: with SmolLM2-135M in float32, 8 slots of rank 32 are about 0.36 GB (all seven
    projections and the head) and 128 pages of 64 tokens about 0.4 GB.  A larger machine is worth a TOML file.
    """
    return ServeConfig(
        model=ModelSection(path=model, dtype="auto"),
        host="127.0.0.1",
        port=8000,
        slots=8,
        max_rank=32,
        rows=8,
        kv_pages=128,
        page_tokens=64,
        prefill_lanes=8,
        prefill_tokens=32,
        default_max_tokens=256,
        max_waiting=256,
        max_waiting_tokens=131_072,
        max_request_s=3600.0,
        grace_s=30.0,
        host_adapters_gb=2.0,
        host_kv_gb=0.5,
        adapters=adapters,
        data=adapters.with_name("data"),
        tuning=Tuning(quantum_ms=200.0),
        training=TrainingSection(slots=4, lanes=4, lane_tokens=256),
    )
