"""Tests of one process or one service function against real PostgreSQL, Redis and S3 servers."""
