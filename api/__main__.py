"""`python -m api`: the control plane on the address that the settings name."""

from types import FrameType

import uvicorn
from fastapi import FastAPI

from api.main import create_app
from core.settings import ApiSettings
from core.telemetry import configure_logs


class ApiServer(uvicorn.Server):
    """A server that ends the open event streams when it is asked to stop: it would wait for them for ever."""

    def __init__(self, app: FastAPI, settings: ApiSettings) -> None:
        super().__init__(uvicorn.Config(app, host=settings.api_host, port=settings.api_port, log_config=None))
        self._feed = app.state.feed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._feed.close()


if __name__ == "__main__":
    configure_logs("api")
    settings = ApiSettings()  # read from the environment
    ApiServer(create_app(settings), settings).run()
