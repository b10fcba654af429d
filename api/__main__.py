"""`python -m api`: the control plane on the address that the settings name."""

import uvicorn

from api.main import create_app
from core.settings import ApiSettings
from core.telemetry import configure_logs

if __name__ == "__main__":
    configure_logs("api")
    settings = ApiSettings()  # read from the environment
    uvicorn.run(create_app(settings), host=settings.api_host, port=settings.api_port, log_config=None)
