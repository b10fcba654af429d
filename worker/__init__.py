"""The GPU side: a supervisor that speaks to PostgreSQL, its trainer child that holds the base, and the schedule."""
