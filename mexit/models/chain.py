"""Modules over carried features, one after the other; and the single-exit network that hides in a multi-exit one.

"Triple wins" (RDI-Nets, ICLR 2020) compares a defended multi-exit network with the defended single-exit network
of the same backbone. That baseline is not written a second time: it is every trunk in one stage, with the last
head; the side heads are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mexit.models.multi_exit import MultiExit, Stage


class Chain(nn.Module):
    """Like `nn.Sequential`, but a tuple that one module returns is the arguments of the next."""

    def __init__(self, links: Sequence[nn.Module]) -> None:
        super().__init__()
        self.links = nn.ModuleList(links)

    def forward(self, *carried: Tensor) -> tuple[Tensor, ...]:
        """Carried features to the next ones."""
        for link in self.links:
            out = link(*carried)
            carried = tuple(out) if isinstance(out, tuple | list) else (out,)
        return carried


def single_exit(network: MultiExit) -> MultiExit:
    """The same backbone with its last exit only; the modules are shared with `network`, not copied."""
    stages = [stage for stage in network.stages if isinstance(stage, Stage)]
    whole = Stage(Chain([stage.trunk for stage in stages]), stages[-1].head)
    return MultiExit([whole], network.input_shape, network.classes, network.normalise)
