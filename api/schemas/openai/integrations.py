"""OpenAI's integrations as a list that must be empty: they are described, and none is accepted.

The items have no type of their own here. A request that names one is refused in words, whatever the item is.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import WithJsonSchema

_WANDB = {
    "type": "object",
    "description": "Where a run of Weights & Biases is kept.",
    "properties": {
        "project": {"type": "string", "description": "The project of the run."},
        "name": {"type": ["string", "null"], "description": "The name of the run. Null for the job's id."},
        "entity": {"type": ["string", "null"], "description": "The team or user of the run. Null for the default."},
        "tags": {"type": "array", "items": {"type": "string"}, "description": "The labels of the run."},
    },
    "required": ["project"],
}
_INTEGRATION = {
    "type": "object",
    "description": "A service that OpenAI sends a job's numbers to. None is supported here.",
    "properties": {
        "type": {"type": "string", "enum": ["wandb"], "description": "The kind of integration: `wandb` only."},
        "wandb": _WANDB,
    },
    "required": ["type", "wandb"],
}
Integrations = Annotated[list[Any], WithJsonSchema({"type": "array", "items": _INTEGRATION, "maxItems": 0})]
