"""The application: routes, error objects, and the two things every request shares (database pool, object store)."""

from __future__ import annotations

from fastapi import FastAPI

from api.auth import Authenticator
from api.errors import install_error_handlers
from api.middleware import RequestIdMiddleware
from api.routes import adapters, api_keys, checkpoints, files, fine_tuning, graders, health, models, uploads
from core.db.session import connect
from core.settings import ApiSettings
from core.storage import S3ObjectStore


def create_app(settings: ApiSettings) -> FastAPI:
    app = FastAPI(title="Espalier", version="0.1.0", description="OpenAI's fine-tuning API on your own GPUs.")
    app.state.settings = settings
    app.state.engine = connect(settings.database_url.get_secret_value(), pool_size=20)
    app.state.authenticator = Authenticator(app.state.engine)
    app.state.store = S3ObjectStore(settings.storage_config)
    for routes in (files, uploads, fine_tuning, checkpoints, graders, models, adapters, api_keys, health):
        app.include_router(routes.router)
    app.add_middleware(RequestIdMiddleware)
    install_error_handlers(app)
    return app
