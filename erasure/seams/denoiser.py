"""Hooks around the denoiser's call: change what goes in, change what comes out."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..families import Family

Inputs = dict[str, Any]


@contextmanager
def calls(
    pipe: Any, family: Family, before: Callable[[Inputs], None] | None = None, after: Callable[[Tensor], Tensor] | None = None
) -> Iterator[int]:
    """Run ``before`` on each call's inputs, by name and in place, and ``after`` on its prediction. Yields the number of denoisers."""

    def pre(module: nn.Module, args: tuple[Any, ...], kwargs: Inputs) -> tuple[tuple[Any, ...], Inputs]:
        names = ("sample", "timestep", family.context)
        inputs = dict(zip(names, args, strict=False)) | kwargs
        assert before is not None
        before(inputs)
        return (), inputs

    def post(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        assert after is not None
        if isinstance(output, tuple):
            return (after(output[0]), *output[1:])
        output.sample = after(output.sample)
        return output

    with ExitStack() as stack:
        for component in family.denoisers:
            denoiser = getattr(pipe, component)
            if before is not None:
                stack.enter_context(denoiser.register_forward_pre_hook(pre, with_kwargs=True))
            if after is not None:
                stack.enter_context(denoiser.register_forward_hook(post))
        yield len(family.denoisers)


class StepCounter:
    """Counts sampling steps by the timesteps that pass: solvers that call the denoiser twice a step count once."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.step = -1
        self._last: float | None = None

    def see(self, timestep: Any) -> int:
        """The index of the step that a call with this timestep belongs to."""
        now = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        if now != self._last:
            self.step, self._last = self.step + 1, now
        return self.step
