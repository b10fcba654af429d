"""The Celery application of a worker: one task, one queue for each pool, wake-ups only (see core.queue).

Jobs run for hours, and only PostgreSQL stores them. So a wake-up is acknowledged when it arrives, Celery retries and
stores nothing, and no socket timeout can stop the consumer from receiving.
"""

from __future__ import annotations

from celery import Celery
from kombu import Queue

from core.queue import connect_broker, queue_name
from core.settings import WorkerSettings


def create_celery(settings: WorkerSettings) -> Celery:
    celery = connect_broker(settings.redis_url.get_secret_value())
    celery.conf.update(
        task_queues=[Queue(queue_name(pool)) for pool in settings.worker_pools],
        task_create_missing_queues=False,
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        task_reject_on_worker_lost=False,
        task_retry_on_worker_lost=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        task_ignore_result=True,
        result_backend=None,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_serializer="json",
        accept_content=["json"],
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_transport_options={
            "visibility_timeout": 300,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
    )
    return celery
