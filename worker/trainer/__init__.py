"""The trainer: a child process that holds one frozen base model and trains the jobs its supervisor hands it.

It speaks to its supervisor over two pipes and to the object store through presigned URLs. It holds no credentials and
may be killed at any moment.
"""
