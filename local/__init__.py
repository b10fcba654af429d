"""The local stack: PostgreSQL, Redis, S3 and the service as child processes of one launcher, without root or Docker."""
