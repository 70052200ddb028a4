"""LoRA adapters loaded beside the user's own, guarded while they are in, and taken out without a trace."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Conflict, NotErased, NothingAttached
from ..lora import Factors, by_component, live_name, settings
from .instance import overridden

SCALES = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""Arguments of denoisers through which a call can scale all LoRA layers."""
SCALED = "the scale in {} holds for the attached eraser as well; scale your own LoRA by pipe.set_adapters(names, weights)"


@contextmanager
def loaded(pipe: Any, factors: Mapping[str, Tensor]) -> Iterator[int]:
    """Load factors as an adapter beside the user's own, and guard it; yields the number of layers. Leaves the pipeline as it was."""
    name = _unused_name(pipe)

    def refuse(action: str, remedy: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def raising(*args: Any, **kwargs: Any) -> None:
            raise NotErased(f"{action} while an adapter eraser ({name}) is attached {remedy}; use erasure export")

        return lambda inner: raising

    with ExitStack() as stack:
        touched = sum(stack.enter_context(_in_component(pipe, c, layers, name)) for c, layers in by_component(factors).items())
        stack.enter_context(overridden(pipe, "save_pretrained", refuse("save_pretrained", "writes layers that load as random numbers")))
        stack.enter_context(overridden(pipe, "fuse_lora", refuse("fuse_lora", "cannot be undone bit-exactly")))
        stack.enter_context(overridden(pipe, "encode_prompt", _unscaled))
        yield touched


@contextmanager
def muted(pipe: Any) -> Iterator[None]:
    """Adapters that are loaded in ``pipe`` have no effect here, those that an eraser loads meanwhile have: checks are of the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = (layer for part in pipe.components.values() if isinstance(part, nn.Module) for layer in part.modules())
    layers = [layer for layer in modules if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _unscaled(encode_prompt: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a scale for all LoRA layers before ``encode_prompt`` applies it: it would not take it back after an error."""

    @functools.wraps(encode_prompt)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("lora_scale") not in (None, 1.0):
            raise NotErased(SCALED.format("lora_scale"))
        return encode_prompt(*args, **kwargs)

    return checked


def _unused_name(pipe: Any) -> str:
    taken = {name for module in pipe.components.values() for name in getattr(module, "peft_config", {})}
    return next(name for number in itertools.count(1) if (name := f"erasure_{number:03}") not in taken)


@contextmanager
def _in_component(pipe: Any, component: str, layers: Factors, name: str) -> Iterator[int]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    module = _component(pipe, component, layers)
    tuned = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    if any(layer.merged for layer in tuned):
        raise Conflict(f"a LoRA is fused into {component}, where further adapters have no effect; unfuse it, or unload it after fusing")
    users = list(tuned[0].active_adapters) if tuned else []
    disabled = bool(tuned) and tuned[0].disable_adapters
    grads = [(p, p.requires_grad) for p in module.parameters()]
    active = {layer: list(layer.active_adapters) for layer in tuned}
    with ExitStack() as stack:
        stack.callback(_restore_grads, grads)
        stack.callback(_unload, module, layers, name, active if disabled else {})
        device = next(module.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # factors start as random numbers, then are read
            _load(pipe, component, module, layers, name)
        for layer in module.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(True)
                layer.set_adapter([*([] if disabled else active.get(layer, users)), name], inference_mode=True)
        for handle in _guards(component, module, layers, name):
            stack.enter_context(handle)
        yield len(layers)


def _component(pipe: Any, component: str, layers: Factors) -> nn.Module:
    """The component, if diffusers can load adapters there and it has the layers."""
    module = getattr(pipe, component, None)
    if not isinstance(module, nn.Module):
        raise NothingAttached(f"{type(pipe).__name__} has no {component}, for which the eraser has LoRA layers")
    if component not in getattr(pipe, "_lora_loadable_modules", ()):
        raise NothingAttached(f"diffusers loads no LoRA into {component} of {type(pipe).__name__}")
    present = {key.removesuffix(".base_layer") for key, _ in module.named_modules()}
    if missing := [layer for layer in layers if live_name(module, layer) not in present]:
        raise NothingAttached(f"{component} has no layer {missing[0]} (and {len(missing) - 1} others of the eraser): another base model")
    return module


def _load(pipe: Any, component: str, module: nn.Module, layers: Factors, name: str) -> None:
    """Load by diffusers, then look whether it did: an adapter that does not fit is skipped there with only a warning."""
    state = {f"{component}.{layer}.lora_{side}.weight": t for layer, pair in layers.items() for side, t in pair.items()}
    header = {f"{component}.{key}": value for key, value in settings(layers).items()}
    try:
        if component.startswith("text_encoder"):
            pipe.load_lora_into_text_encoder(
                state, network_alphas=None, text_encoder=module, prefix=component, adapter_name=name, metadata=header, _pipeline=pipe
            )
        else:
            module.load_lora_adapter(state, prefix=component, adapter_name=name, metadata=header, _pipeline=pipe)  # type: ignore[operator]
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise NothingAttached(f"the adapter does not load into {component}: {error}") from error
    if name not in pipe.get_list_adapters().get(component, ()):
        raise NothingAttached(f"diffusers did not load the adapter into {component}")
    for layer, pair in layers.items():
        tuned = module.get_submodule(live_name(module, layer))
        for side, tensor in pair.items():
            weight = getattr(tuned, f"lora_{side}")[name].weight
            if not weight.is_meta and not torch.equal(weight, tensor.to(weight)):  # meta: offloaded layer by layer
                raise NothingAttached(f"{component}.{layer} did not take lora_{side} of the eraser")


def _guards(component: str, module: nn.Module, layers: Factors, name: str) -> Iterator[Any]:
    """Hooks that refuse to run without the adapter at full strength; they look at the module they are called with, so copies keep them."""
    remedy = f"pipe.set_adapters([…, {name!r}], [1.0, …]) turns it on beside others, erasure.detach(pipe) takes it off"

    def present(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in getattr(module, "peft_config", {}):
            raise NotErased(f"the adapter {name} was removed from {component} while its eraser is attached")
        if scaled := [key for key in SCALES if (kwargs.get(key) or {}).get("scale", 1.0) != 1.0]:
            raise NotErased(SCALED.format(scaled[0]))

    def active(layer: Any, args: tuple[Any, ...]) -> None:
        strength = layer.scaling.get(name, 0.0) if name in layer.active_adapters and not layer.disable_adapters else 0.0
        if layer.merged or abs(strength - 1.0) > 1e-6:
            raise NotErased(f"the attached eraser ({name} in {component}) is at strength {strength:g}, not 1; {remedy}")

    yield module.register_forward_pre_hook(present, with_kwargs=True)
    for layer in layers:
        yield module.get_submodule(live_name(module, layer)).register_forward_pre_hook(active)


def _unload(module: Any, layers: Factors, name: str, disabled: Mapping[Any, list[str]]) -> None:
    """Delete the adapter and unwrap the layers that it alone had wrapped; adapters that were ``disabled`` are so again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    fused = False
    for key, layer in list(module.named_modules()):
        if not isinstance(layer, BaseTunerLayer):
            continue
        if name in layer.merged_adapters:
            layer.unmerge()
            fused = True
        layer.set_adapter([other for other in layer.active_adapters if other != name])
        layer.delete_adapter(name)
        if layer in disabled:
            layer.set_adapter(disabled[layer])
            layer.enable_adapters(False)
        if not layer._all_available_adapter_names():
            parent, _, child = key.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
    configs = getattr(module, "peft_config", {})
    configs.pop(name, None)
    if not configs:
        vars(module).pop("peft_config", None)
        vars(module).pop("_hf_peft_config_loaded", None)
    if fused:
        raise Conflict("a LoRA eraser was fused while it was attached: its layers are back only up to rounding; load the base again")


def _restore_grads(grads: Iterable[tuple[Tensor, bool]]) -> None:
    for parameter, wanted in grads:
        parameter.requires_grad_(wanted)
