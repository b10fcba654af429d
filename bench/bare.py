"""What the control plane is measured against: a FastAPI application of one route that does nothing."""

from __future__ import annotations

from fastapi import FastAPI

BASE_ID = "acme-labs/tiny"
app = FastAPI()


@app.get("/bare")
def bare() -> dict[str, str]:
    return {"object": "nothing"}
