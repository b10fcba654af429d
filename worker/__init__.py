"""The GPU side: a supervisor that talks to PostgreSQL, and its child, the trainer, which holds the base."""
