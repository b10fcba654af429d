"""The baseline of the control plane's measurements: a FastAPI application with one route that does nothing."""

from __future__ import annotations

from fastapi import FastAPI

BASE_ID = "acme-labs/tiny"
app = FastAPI()


@app.get("/bare")
def bare() -> dict[str, str]:
    return {"object": "nothing"}
