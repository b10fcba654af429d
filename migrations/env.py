"""Alembic's environment. It runs on the connection that `core.db.migrate` passes to it."""

from alembic import context

from core.db import models  # noqa: F401 (declares the tables)
from core.db.base import Row

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Row.metadata, compare_type=True, compare_server_default=False)
with context.begin_transaction():
    context.execute("set local lock_timeout = '5s'")
    context.run_migrations()
