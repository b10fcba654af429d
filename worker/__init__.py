"""The GPU side: a supervisor that speaks to PostgreSQL, and its trainer child that holds the base."""
