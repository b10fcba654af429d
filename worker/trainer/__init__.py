"""The trainer: a child process that holds one frozen base model and trains the jobs that its supervisor sends it.

It talks to its supervisor over two pipes, and to the object store through presigned URLs. It holds no credentials and
may be killed at any moment.
"""
