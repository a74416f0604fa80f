"""Frozen weights of decoder layers, cut over processes: bytes that arrive where they are used.

FSDP2 cuts each parameter by rows, so that what it gathers has to be copied before anything can read it. What no
optimizer steps on and no checkpoint holds needs no rows: a layer's frozen weights lie one behind the other, as a line
of bytes of which each process keeps an equal piece, and gathering it needs no copy and knows no dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainer.errors import PacktrainError
from trainer.processes import Processes
from trainer.strategies.gathering import Piece
from trainer.streams import Mark, SideStream

ALIGNMENT = 256  # bytes, of a parameter's begin, for kernels that read vectors


class FrozenLayers:
    """Keeps the decoder layers' frozen weights cut, and makes a layer's whole while it computes.

    The next layer's are on their way meanwhile. The topmost layer's stay from forward to backward, and the lowest
    layer's from a backward to the next forward.

    Args:
        layers: from the bottom, their parameters on the meta device; frozen ones are replaced by views of the bytes.
        group: the processes that share one copy.
        device: where layers compute.
        make_piece: see `choose_piece`.
        reshard: let go of a layer between its forward and its backward.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        group: dist.ProcessGroup,
        device: torch.device,
        make_piece: Callable[[int], Piece] | None,
        reshard: bool,
    ) -> None:
        self._layers = [_Layer(layer, group, device, make_piece) for layer in layers]
        self._owners = {parameter: layer for layer in self._layers for parameter in layer.places}
        self._group, self._beside = group, SideStream(device)
        self._reshard, self._in_backward = reshard, False
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._before_forward, index))
            layer.register_forward_hook(partial(self._after_forward, index))

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return parameter in self._owners

    def place(self, parameter: nn.Parameter, whole: torch.Tensor) -> None:
        """Keeps this process's bytes of `whole`, cast to the parameter's dtype."""
        assert whole.shape == parameter.shape, f"{tuple(whole.shape)} into {tuple(parameter.shape)}"
        assert whole.is_floating_point() == parameter.is_floating_point(), f"{whole.dtype} into {parameter.dtype}"
        own, mine = self._owners[parameter].own_part(parameter)
        own.copy_(whole.to(parameter.dtype).contiguous().view(-1).view(torch.uint8)[mine])

    def settle(self, processes: Processes) -> None:
        """After the last `place`, on all processes together: from now on layers are made whole.

        Each is once, to see that every byte arrives where it belongs.

        Raises:
            PacktrainError: on all processes, one of them was brought other bytes than were placed.
        """
        if processes.device.type == "cuda":
            torch.cuda.synchronize(processes.device)
        sums = torch.stack([layer.own_sum() for layer in self._layers])
        of_all = [torch.empty_like(sums) for _ in range(self._group.size())]
        dist.all_gather(of_all, sums, group=self._group)
        found = [layer.sums() for layer in self._layers]  # all, whatever one of them says: others wait for this process
        is_right = torch.equal(torch.stack(found, dim=1), torch.stack(of_all))
        wrong = [str(rank) for rank, it_is in enumerate(processes.gather(is_right)) if not it_is]
        if wrong:
            raise PacktrainError(
                f"rank {', '.join(wrong)}: frozen weights that the others hold did not arrive as they were placed; "
                "their GPUs, or what links them, are at fault"
            )

    def own(self, parameter: nn.Parameter) -> torch.Tensor:
        """This process's bytes of a parameter, perhaps none."""
        return self._owners[parameter].own_part(parameter)[0]

    def release(self) -> None:
        """Lets go of every layer, whatever a forward or backward that came to no end has left."""
        self._in_backward = False
        for layer in self._layers:
            self._free(layer)

    def end_backward(self) -> None:
        """After the last layer's backward; the lowest layer's weights stay for the next forward."""
        self._in_backward = False
        for layer in self._layers[1:]:
            self._free(layer)

    def _before_forward(self, index: int, module: nn.Module, inputs: Any) -> None:
        self._need(index)
        if not self._in_backward:  # else a checkpoint computes it again
            self._send_for(index + 1)

    def _after_forward(self, index: int, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if self._in_backward:
            return
        if output.requires_grad:
            output.register_hook(partial(self._before_backward, index))
            if index == len(self._layers) - 1 or not self._reshard:
                return
        self._free(self._layers[index])

    def _before_backward(self, index: int, grad: torch.Tensor) -> None:
        self._in_backward = True
        for above in self._layers[index + 1 : index + 2]:
            self._free(above)
        self._need(index)
        self._send_for(index - 1)

    def _send_for(self, index: int) -> None:
        """Has a layer's weights brought beside what computes."""
        if not 0 <= index < len(self._layers) or self._layers[index].is_whole:
            return
        layer = self._layers[index]
        layer.allocate()
        with self._beside.beside():
            layer.fill()
        layer.arrival = self._beside.mark()

    def _need(self, index: int) -> None:
        self._send_for(index)
        layer = self._layers[index]
        self._beside.wait(layer.arrival)
        layer.arrival = None

    def _free(self, layer: _Layer) -> None:
        self._beside.wait(layer.arrival)  # before anything else is written there
        layer.arrival = None
        layer.free()


class _Layer:
    """One layer's bytes.

    Attributes:
        places: of its frozen parameters in the line of bytes.
        is_whole: they are all there, or on their way.
        arrival: when they are there; None: nobody has to wait.
    """

    arrival: Mark

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup,
        device: torch.device,
        make_piece: Callable[[int], Piece] | None,
    ) -> None:
        frozen = [
            (owner, leaf, parameter)
            for owner in module.modules()
            for leaf, parameter in owner.named_parameters(recurse=False)
            if not parameter.requires_grad
        ]
        begins, total = [], 0
        for _, _, parameter in frozen:
            begins.append(total)
            total += _aligned(_num_bytes(parameter))
        piece_bytes = _aligned(-(-total // group.size()))
        self._line = torch.zeros(piece_bytes * group.size(), dtype=torch.uint8, device=device)
        self.places: dict[nn.Parameter, slice] = {}
        for (owner, leaf, parameter), begin in zip(frozen, begins, strict=True):
            end = begin + _num_bytes(parameter)
            # `data` has a version of its own: filling the line is no change of a tensor that autograd has saved.
            view = self._line.data[begin:end].view(parameter.dtype).view(parameter.shape)
            owner.register_parameter(leaf, nn.Parameter(view, requires_grad=False))
            self.places[owner.get_parameter(leaf)] = slice(begin, end)
        self.is_whole, self.arrival, self._num_pieces = True, None, group.size()
        self._piece = make_piece(piece_bytes) if make_piece and frozen else None
        self._own = self._piece.own if self._piece else self._line
        self._first = group.rank() * piece_bytes if self._piece else 0
        self.free()

    def own_part(self, parameter: nn.Parameter) -> tuple[torch.Tensor, slice]:
        """This process's bytes of a parameter as they rest, and which of its bytes they are."""
        place, first, last = self.places[parameter], self._first, self._first + len(self._own)
        begin, end = (min(max(edge, first), last) for edge in (place.start, place.stop))
        return self._own[begin - first : end - first], slice(begin - place.start, end - place.start)

    def own_sum(self) -> torch.Tensor:
        """Of this process's part as integers of 4 bytes, on the CPU."""
        return self._own.view(torch.int32).sum(dtype=torch.int64).cpu()

    def sums(self) -> torch.Tensor:
        """As `own_sum`, of the parts of all processes as they arrive here."""
        if not self._piece:
            return self.own_sum().expand(self._num_pieces)
        self.allocate()
        self.fill()
        found = self._line.view(torch.int32).view(self._num_pieces, -1).sum(1, dtype=torch.int64).cpu()
        self.free()
        return found

    def allocate(self) -> None:
        """Memory for the whole line, of the stream that computes."""
        self._line.untyped_storage().resize_(self._line.numel())
        self.is_whole = True

    def fill(self) -> None:
        """Brings the whole line together."""
        if self._piece:
            self._piece.fill(self._line)

    def free(self) -> None:
        """Lets go of the line where a piece is enough to make it again."""
        if self._piece and self.is_whole:
            self._line.untyped_storage().resize_(0)
            self.is_whole = False


def _num_bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
