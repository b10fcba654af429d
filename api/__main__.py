"""`python -m api`: the control plane on the address that the settings name, in one process or in several."""

import sys

from api.processes import ProcessGroup
from api.server import serve
from core.sandbox import hide_memory
from core.settings import ApiSettings
from core.telemetry import configure_logs

if __name__ == "__main__":
    hide_memory()
    configure_logs("api")
    settings = ApiSettings()  # read from the environment
    if settings.api_processes > 1:
        sys.exit(ProcessGroup(settings).run())
    serve(settings)
