"""How the database's tables came to be, revision by revision; each can be undone.

The version table is alembic's own, so its tools read it.  All steps of one call are in one transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations

from jaxlora.core.errors import ConfigInvalid

POSTGRES_LOCK = 0x6A61786C  # two processes that start at once take turns


@dataclass(frozen=True, kw_only=True, slots=True)
class Revision:
    """One step between two forms of the tables."""

    id: str
    upgrade: Callable[[Operations], None]
    downgrade: Callable[[Operations], None]


def create_first(op: Operations) -> None:
    """Keys, files, jobs."""
    op.create_table(
        "api_keys",
        *owned(),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("label", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("revoked_s", sa.Double()),
        sa.UniqueConstraint("digest"),
    )
    op.create_table(
        "files",
        *owned(),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("expires_s", sa.Double()),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("status_details", sa.Text()),
        sa.Column("deleted_s", sa.Double()),
    )
    op.create_index("files_in_order", "files", ["tenant", "created_s", "id"])
    op.create_table(
        "jobs",
        *owned(),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("request", sa.Text(), nullable=False),
        sa.Column("resolved", sa.Text(), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("started_s", sa.Double()),
        sa.Column("finished_s", sa.Double()),
        sa.Column("progress", sa.Text(), nullable=False),
        sa.Column("error", sa.Text()),
        sa.Column("next_seq", sa.Integer(), nullable=False),
    )
    op.create_index("jobs_in_order", "jobs", ["tenant", "created_s", "id"])
    op.create_index("ix_jobs_status", "jobs", ["status"])
    create_of_jobs(op)


def create_of_jobs(op: Operations) -> None:
    """What belongs to a job and goes with it."""
    op.create_table(
        "job_files",
        sa.Column("job", sa.String(), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("file", sa.String(), primary_key=True),
    )
    op.create_index("ix_job_files_file", "job_files", ["file"])
    op.create_table(
        "job_events",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("job", sa.String(), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("time_s", sa.Double(), nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.UniqueConstraint("job", "seq", name="job_events_in_order"),
    )
    op.create_table(
        "job_checkpoints",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("job", sa.String(), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("metrics", sa.Text(), nullable=False),
        sa.Column("created_s", sa.Double(), nullable=False),
    )
    op.create_index("job_checkpoints_in_order", "job_checkpoints", ["job", "version"])


def drop_first(op: Operations) -> None:
    """Back to an empty database."""
    for table in ("job_checkpoints", "job_events", "job_files", "jobs", "files", "api_keys"):
        op.drop_table(table)


def create_gradient(op: Operations) -> None:
    """Adapters of the Gradient API, and answers to repeated requests."""
    op.create_table(
        "gradient_adapters",
        *owned(),
        sa.Column("workspace", sa.Text(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("base", sa.String(), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("updated_s", sa.Double(), nullable=False),
        sa.Column("calls", sa.Integer(), nullable=False),
    )
    op.create_index("gradient_adapters_in_order", "gradient_adapters", ["tenant", "created_s", "id"])
    op.create_table(
        "idempotency",
        sa.Column("tenant", sa.String(), primary_key=True),
        sa.Column("route", sa.String(), primary_key=True),
        sa.Column("key", sa.String(), primary_key=True),
        sa.Column("request_sha256", sa.String(), nullable=False),
        sa.Column("status", sa.Integer()),
        sa.Column("body", sa.Text()),
        sa.Column("created_s", sa.Double(), nullable=False),
    )


def drop_gradient(op: Operations) -> None:
    """Back to keys, files and jobs."""
    op.drop_table("idempotency")
    op.drop_table("gradient_adapters")


def create_instance(op: Operations) -> None:
    """What a server knows of itself."""
    op.create_table(
        "instance",
        sa.Column("key", sa.String(), primary_key=True),
        sa.Column("value", sa.Text(), nullable=False),
    )


def drop_instance(op: Operations) -> None:
    """Back to a database of no server in particular."""
    op.drop_table("instance")


def owned() -> tuple[sa.Column, ...]:
    """The columns of every table of tenants' objects."""
    return (
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("created_s", sa.Double(), nullable=False),
    )


REVISIONS = (
    Revision(id="0001", upgrade=create_first, downgrade=drop_first),
    Revision(id="0002", upgrade=create_gradient, downgrade=drop_gradient),
    Revision(id="0003", upgrade=create_instance, downgrade=drop_instance),
)
VERSION_TABLE = sa.Table(
    "alembic_version",
    sa.MetaData(),
    sa.Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)


def migrate(connection: sa.Connection, *, to: int = len(REVISIONS)) -> None:
    """Brings the tables to the first `to` revisions, up or down, in the connection's transaction.

    Raises ConfigInvalid for a database that a newer program has changed, and for another program's.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(POSTGRES_LOCK)))
    context = MigrationContext.configure(connection)
    current = context.get_current_revision()
    ids = [None, *(r.id for r in REVISIONS)]
    if current not in ids:
        raise ConfigInvalid(
            f"the database is of the revision {current}, which this program does not know (its last is {ids[-1]}); "
            "use the program that made it, or a newer one"
        )
    if current is None and "jobs" in (tables := sa.inspect(connection).get_table_names()):
        raise ConfigInvalid(
            f"the database holds tables of another program ({', '.join(sorted(tables)[:5])}); name one of jaxlora's own"
        )
    VERSION_TABLE.create(connection, checkfirst=True)
    at, op = ids.index(current), Operations(context)
    if at == to:
        return
    for revision in REVISIONS[at:to]:
        revision.upgrade(op)
    for revision in reversed(REVISIONS[to:at]):
        revision.downgrade(op)
    connection.execute(VERSION_TABLE.delete())
    if to:
        connection.execute(VERSION_TABLE.insert().values(version_num=ids[to]))
