"""What the engine needs of a base model. Loading checks it and refuses a base that cannot be fused, with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from core.domain.bases import LINEARS_BY_MODEL_TYPE
from worker.engine.errors import UnsupportedBaseError

# Rotary embeddings whose frequencies depend on the longest sequence of a forward. With them, one tenant's lengths would
# change another tenant's result.
_COUPLING_ROPE_TYPES = frozenset({"dynamic", "longrope"})
# Linears that a parent calls in this order on the same rows.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class BaseShape:
    """A base model's numbers: `linears` maps the qualified name of each linear to (in features K, out features N).

    `siblings` are the same names, in groups that read the same rows.
    """

    linears: dict[str, tuple[int, int]]
    siblings: tuple[tuple[str, ...], ...]
    num_layers: int
    hidden_size: int
    vocab_size: int

    @property
    def target_modules(self) -> tuple[str, ...]:
        return tuple(sorted({name.rpartition(".")[2] for name in self.linears}))


def inspect_base(model: Any) -> BaseShape:
    """Return the base's shape. Raises UnsupportedBaseError."""
    config = model.config
    if config.model_type not in LINEARS_BY_MODEL_TYPE:
        supported = ", ".join(sorted(LINEARS_BY_MODEL_TYPE))
        raise UnsupportedBaseError(f"Models of type {config.model_type!r} cannot be fused; supported: {supported}.")
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in _COUPLING_ROPE_TYPES:
        raise UnsupportedBaseError(
            f"Rotary embeddings of type {rope_type!r} depend on the longest sequence of a step, so tenants would "
            "change each other's results; choose a base with fixed ones, such as its short-context variant."
        )
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head.weight) is not nn.Parameter or not head.weight.is_floating_point():
        raise UnsupportedBaseError("The language-model head must be a dense linear layer.")
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return BaseShape(
        linears=linears,
        siblings=_find_siblings(linears),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=head.weight.shape[0],
    )


def _find_siblings(names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        family = next((family for family in _SIBLINGS if child in family), (child,))
        found.setdefault((parent, family), []).append(name)
    return tuple(tuple(siblings) for siblings in found.values())


def freeze_base(model: nn.Module) -> None:
    """Make the base constant. It stays in train mode: an eval-mode forward may repack 4-bit weights in place."""
    model.requires_grad_(requires_grad=False)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def recompute_layers(model: nn.Module, num_layers: int) -> None:
    """Let the first `num_layers` decoder layers keep their inputs only, and compute them again in the backward."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[:num_layers]:
        layer.gradient_checkpointing = True
        # Dropout is seeded and uses no stateful generator, so no generator's state has to be restored.
        recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        setattr(layer, "_gradient_checkpointing_func", recompute)  # noqa: B010 (a name that transformers gives it)
