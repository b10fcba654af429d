"""The rows: PostgreSQL is the truth about every tenant, file, job, attempt and adapter."""
