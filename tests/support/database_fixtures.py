"""An empty database of either kind: `pytest_plugins = ["database_fixtures"]`; PostgreSQL's only with `-m postgres`."""

import os
import uuid

import pytest

from serve.db.database import Database


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request, tmp_path):
    """The URL of a database that is made for one test."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/data/jaxlora.sqlite"
        return
    import psycopg

    server = os.environ["JAXLORA_TEST_POSTGRES"]  # postgresql://user@host:port; tests/run_postgres.sh sets it
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")  # ty: ignore[invalid-argument-type]
        try:
            yield f"{server}/{name}"
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")  # ty: ignore[invalid-argument-type]


@pytest.fixture
def database(database_url):
    it = Database(database_url, patience_s=2.0)
    yield it
    it.close()
