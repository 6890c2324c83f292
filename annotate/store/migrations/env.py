"""Alembic's entry: runs the revisions on the connection that `upgrade` was given, in its transaction."""

from alembic import context

from align.annotate.store.migrations import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
