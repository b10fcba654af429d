"""The schema's migrations, which Alembic runs, and what several of them use."""
