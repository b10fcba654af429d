"""The migrations are one chain that makes what the models say, and can be undone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect

from core.db.migrate import MIGRATIONS_DIR


@pytest.fixture
def connection(owner: Engine) -> Iterator[Connection]:
    with owner.connect() as made, made.begin() as transaction:
        yield made
        transaction.rollback()


def configure(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS_DIR))
    config.attributes["connection"] = connection
    return config


def test_the_models_and_the_migrated_schema_are_the_same(connection: Connection) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Skipped unsupported reflection of expression-based index")
        command.check(configure(connection))


def test_there_is_one_chain(connection: Connection) -> None:
    assert len(ScriptDirectory.from_config(configure(connection)).get_heads()) == 1


def test_every_migration_can_be_undone_and_done_again(connection: Connection) -> None:
    config = configure(connection)
    command.downgrade(config, "base")
    assert inspect(connection).get_table_names() == ["alembic_version"]
    command.upgrade(config, "head")
