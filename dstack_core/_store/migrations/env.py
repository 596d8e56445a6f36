"""Alembic's entry. The connection, its transaction and the lock come from `upgrade`."""

from alembic import context

from dstack_core._store.migrations.upgrade import options

context.configure(connection=context.config.attributes["connection"], **options())
with context.begin_transaction():
    context.run_migrations()
