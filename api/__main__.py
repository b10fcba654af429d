"""`python -m api` serves the control plane on the address of the settings, in one process or in several."""

import sys

from api.processes import ProcessGroup, serve_alone
from core.sandbox import hide_memory
from core.settings import ApiSettings
from core.telemetry.logs import capture_printed, configure_logs

if __name__ == "__main__":
    hide_memory()
    configure_logs("api", captured=())
    settings = ApiSettings()
    if settings.api_processes > 1:  # the children write to the log themselves
        sys.exit(ProcessGroup(settings).run())
    capture_printed()
    serve_alone(settings)
