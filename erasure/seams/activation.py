"""Hooks on inner modules: read or replace activations while a seam is open."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


@contextmanager
def inputs(modules: Iterable[nn.Module], edit: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[int]:
    """Pass each module's first input through ``edit``. Yields how many modules were opened."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (edit(module, args[0]), *args[1:])

    with ExitStack() as stack:
        opened = [stack.enter_context(module.register_forward_pre_hook(hook)) for module in modules]
        yield len(opened)


@contextmanager
def outputs(modules: Iterable[nn.Module], edit: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[int]:
    """Pass each module's output, a tensor, through ``edit``. Yields how many modules were opened."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return edit(module, output)

    with ExitStack() as stack:
        opened = [stack.enter_context(module.register_forward_hook(hook)) for module in modules]
        yield len(opened)
