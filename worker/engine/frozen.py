"""The base's weights. They are frozen, so each is stored in the form in which its device multiplies fastest.

| weight | device | form |
|---|---|---|
| dense, fp32 | CPU | oneDNN's block format, once for each direction |
| dense, another type | CPU or GPU | as torch has it |
| NF4 | CPU or GPU | dequantised once for each product of all tenants |

On a CPU, oneDNN multiplies fp32 by the operators that torch's own compiler uses for a linear. The ordinary product
takes up to twice as long for the few rows of a step. On a GPU, NF4 weights of one shape are dequantised into the same
memory.

Shapes: T rows of the stream, K in, N out; [1, T, K] works as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn.modules import Params4bit
from torch import Tensor, nn

# oneDNN chooses the block format for this many rows. Products of any other number of rows use the same format.
_PACKED_FOR_ROWS = 128
Scratch = dict[torch.Size, Tensor]


class FrozenWeight(ABC):
    """One linear's weight [N, K], and its bias [N] where it has one."""

    def __init__(self, bias_N: Tensor | None) -> None:
        self.bias_N = bias_N

    @abstractmethod
    def multiply(self, x_TK: Tensor) -> Tensor:
        """Return x times the weight's transpose, plus the bias [T, N]."""

    @abstractmethod
    def multiply_back(self, y_grad_TN: Tensor) -> Tensor:
        """Return the gradient of `multiply`'s input [T, K]."""


class DenseWeight(FrozenWeight):
    """A weight as torch has it."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        super().__init__(bias_N)
        self._weight_NK = weight_NK

    def multiply(self, x_TK: Tensor) -> Tensor:
        return nn.functional.linear(x_TK, self._weight_NK, self.bias_N)

    def multiply_back(self, y_grad_TN: Tensor) -> Tensor:
        return y_grad_TN @ self._weight_NK


class PackedWeight(FrozenWeight):
    """A weight in oneDNN's block format, once for each direction."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        super().__init__(bias_N)
        self._packed_NK, self._packed_KN = _pack(weight_NK), _pack(weight_NK.T)

    def multiply(self, x_TK: Tensor) -> Tensor:
        return _multiply_by_onednn(x_TK, self._packed_NK, self.bias_N)

    def multiply_back(self, y_grad_TN: Tensor) -> Tensor:
        return _multiply_by_onednn(y_grad_TN, self._packed_KN, None)


class Nf4Weight(FrozenWeight):
    """A weight that bitsandbytes has quantised. `scratch` is the memory into which weights are dequantised on a GPU."""

    def __init__(self, weight: Params4bit, bias_N: Tensor | None, scratch: Scratch) -> None:
        super().__init__(bias_N)
        self._packed, self._state, self._scratch = weight.data, _flatten(weight.quant_state), scratch

    def multiply(self, x_TK: Tensor) -> Tensor:
        weight_NK = self._dequantize(x_TK.dtype)
        if _is_onednns(weight_NK):
            return _multiply_by_onednn(x_TK, weight_NK, self.bias_N)
        return nn.functional.linear(x_TK, weight_NK, self.bias_N)

    def multiply_back(self, y_grad_TN: Tensor) -> Tensor:
        weight_NK = self._dequantize(y_grad_TN.dtype)
        return _multiply_by_onednn(y_grad_TN, weight_NK.T, None) if _is_onednns(weight_NK) else y_grad_TN @ weight_NK

    def _dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as numbers. They are valid until the next weight of its shape is dequantised."""
        # bitsandbytes can fill given memory on a GPU only. A CPU's allocator keeps freed memory anyway.
        if not self._packed.is_cuda:
            return dequantize_4bit(self._packed, self._state).to(dtype)
        shape = self._state.shape
        weight_NK = dequantize_4bit(self._packed, self._state, out=self._scratch.get(shape))
        self._scratch[shape] = weight_NK
        return weight_NK.to(dtype)


def _flatten(state: QuantState) -> QuantState:
    """Undo the second quantisation, that of the blocks' scales.

    It costs 0.4 bit a weight, and every dequantisation is one kernel instead of three.
    """
    if not state.nested:
        return state
    absmax = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
    return QuantState(
        absmax=absmax,
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )


def freeze_linear(linear: nn.Linear, scratch: Scratch) -> FrozenWeight:
    """Return a linear's weight in the form for its device."""
    weight, bias_N = linear.weight, linear.bias
    if isinstance(weight, Params4bit):
        return Nf4Weight(weight, bias_N, scratch)
    weight_NK = weight.detach()
    return PackedWeight(weight_NK, bias_N) if _is_onednns(weight_NK) else DenseWeight(weight_NK, bias_N)


def _is_onednns(weight_NK: Tensor) -> bool:
    is_fp32_of_cpu = weight_NK.device.type == "cpu" and weight_NK.dtype == torch.float32
    return is_fp32_of_cpu and torch.backends.mkldnn.is_available()


def _pack(weight_NK: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), _PACKED_FOR_ROWS)  # noqa: SLF001
    return packed


def _multiply_by_onednn(x_TK: Tensor, weight: Tensor, bias_N: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, weight, bias_N, "none", [], "")  # noqa: SLF001
    return product
