"""The fused base: a frozen model whose linears serve every slot, from a packed stream to the scores of its labels.

It is made once, when the base is loaded; admitting and evicting jobs never touches it. Shapes: T rows of the stream,
M rows with a label, E hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.attention import IMPLEMENTATION
from worker.engine.bases import freeze_base, inspect_base
from worker.engine.frozen import Scratch, freeze_linear
from worker.engine.heads import Head
from worker.engine.linears import FusedLinear, Siblings
from worker.engine.norms import freeze_norms
from worker.engine.objectives import LabelRows
from worker.engine.packing import PackedBatch
from worker.engine.steps import StepContext


class FusedBase:
    """A model of transformers, changed in place. Raises UnsupportedBaseError when it cannot be fused."""

    def __init__(self, model: Any) -> None:
        self.shape = inspect_base(model)
        freeze_base(model)
        model.set_attn_implementation(IMPLEMENTATION)
        self.decoder: nn.Module = model.base_model
        self.head = Head(model.get_output_embeddings())
        self.context = StepContext(self.device)
        scratch: Scratch = {}
        for names in self.shape.siblings:
            weights = [freeze_linear(model.get_submodule(name), scratch) for name in names]
            siblings = Siblings(names, weights, self.context)
            for name in names:
                model.set_submodule(name, FusedLinear(name, siblings))
        freeze_norms(model)

    @property
    def device(self) -> torch.device:
        return self.head.rows_VE.device

    @property
    def num_weights(self) -> int:
        """The number of weights that every token is multiplied with."""
        return sum(k * n for k, n in self.shape.linears.values()) + self.head.rows_VE.numel()

    def score_labels(self, batch: PackedBatch) -> list[LabelRows]:
        """Score the labels of all slots in one forward, and return each slot's."""
        hidden_ME = self.decode(batch)[batch.label_rows_M]
        scores = self.head.score_labels(hidden_ME, batch.labels_M, pause=self.context.pause)
        num_labels = [[sequence.num_labels for sequence in group.sequences] for group in batch.groups]
        sizes = [sum(each) for each in num_labels]
        rows = zip(scores.nll_M.split(sizes), scores.is_right_M.split(sizes), num_labels, strict=True)
        return [LabelRows(*each) for each in rows]

    def decode(self, batch: PackedBatch) -> Tensor:
        """Return the last hidden state [T, E], with the LoRA of the runs that the context has on the device."""
        output = self.decoder(
            input_ids=batch.token_ids_1T,
            position_ids=batch.positions_1T,
            use_cache=False,
            sequences=batch.sequences,
        )
        hidden_TE: Tensor = output.last_hidden_state[0]
        return hidden_TE
