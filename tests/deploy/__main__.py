"""`python -m tests.deploy CHECK...`: runs deployments one after the other, in one engine that keeps what was built.

    images   the Dockerfile's images, built from nothing, inspected and run
    compose  docker-compose.yml, brought up, trained through, every service restarted
    hosts    two workers on networks of their own, one cut off, frozen, killed
    pods     the pods of k8s/, run as a kubelet runs them

If no engine can start, one line says why, and only the Dockerfiles are linted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from tests.deploy import compose, hosts, images, k8s_run
from tests.deploy.engine import Engine, NoEngineError, running_engine

CHECKS: dict[str, Callable[[Engine], None]] = {
    "images": images.check,
    "compose": compose.check,
    "hosts": hosts.check,
    "pods": k8s_run.check,
}


def main(names: Sequence[str]) -> int:
    if not names or not set(names) <= set(CHECKS):
        print(__doc__)
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    images.lint()
    try:
        with running_engine() as engine:
            for name in names:
                print(f"== {name}", flush=True)
                with images.timed(name):
                    CHECKS[name](engine)
                print(f"{name}: all of it held.", flush=True)
    except NoEngineError as error:
        print(f"No container engine can start here ({error}): not executed: {', '.join(names)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
