"""Hooks that a configuration switches on by name: forward hooks observe, update hooks change gradients.

A configured hook is a registered name or an import path ``package.module:factory``; the factory gets the
model (unwrapped) and returns the hook. Forward hooks see the outputs of modules in training
and cannot change them: what they return is dropped, and a write in place is an error. Update
hooks get the gradients of every step before clipping and may change them in place.

Without hooks ``bool(hooks)`` is false and the loop does no work for them. A forward hook breaks the graph of a
compiled model, which makes it slower.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accel_train.config.fields import import_by_path
from accel_train.config.sections import HooksConfig
from accel_train.errors import ConfigError
from accel_train.model.transformer import Block


class ForwardHook(ABC):
    """Base of forward hooks: override :meth:`observe`, and the others where needed."""

    def selects(self, name: str, module: nn.Module) -> bool:
        """Return whether to observe this module, named as in ``named_modules``; default: every transformer block."""
        return isinstance(module, Block)

    @abstractmethod
    def observe(self, name: str, output: Any) -> None:
        """Look at the output of module ``name`` in a training forward pass, without gradient; never change it."""

    def scalars(self) -> dict[str, float]:
        """Return numbers for the log, by name; called at log boundaries only, so it may read tensors."""
        return {}


UpdateHook = Callable[[int, Mapping[str, Tensor]], None]
"""Called as ``hook(step, gradients)``: the gradient of every parameter that has one, by name."""


class ActivationStats(ForwardHook):
    """Logs mean and standard deviation of every transformer block's last output."""

    def __init__(self, model: nn.Module) -> None:
        self._stats: dict[str, Tensor] = {}

    def observe(self, name: str, output: Tensor) -> None:
        """Keep the two numbers on the device; nothing waits for it."""
        self._stats[name] = torch.stack(torch.std_mean(output.float(), correction=0))

    def scalars(self) -> dict[str, float]:
        """Return ``activations/<block>/mean`` and ``activations/<block>/std``, in one transfer."""
        figures: dict[str, float] = {}
        if self._stats:
            for name, (std, mean) in zip(self._stats, torch.stack([*self._stats.values()]).tolist(), strict=True):
                figures |= {f"activations/{name}/mean": mean, f"activations/{name}/std": std}
        return figures


def identity(model: nn.Module) -> UpdateHook:
    """Return an update hook that leaves the gradients as they are."""

    def hook(step: int, gradients: Mapping[str, Tensor]) -> None:
        pass

    return hook


FORWARD_HOOKS: dict[str, Callable[[nn.Module], ForwardHook]] = {"activation_stats": ActivationStats}
UPDATE_HOOKS: dict[str, Callable[[nn.Module], UpdateHook]] = {"identity": identity}


class Hooks:
    """The hooks of one run, attached to its model; false if there are none.

    Args:
        model: the model without wrappers.
        forward: forward hooks by configured name.
        update: update hooks by configured name.

    Raises:
        ConfigError: a forward hook selects no module of this model.
    """

    def __init__(self, model: nn.Module, forward: Mapping[str, ForwardHook], update: Mapping[str, UpdateHook]) -> None:
        self.names: tuple[str, ...] = (*forward, *update)
        self._forward, self._update = dict(forward), dict(update)
        # By order and not by identity: wrappers such as FSDP put other parameter objects in place.
        self._parameter_names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for hook_name, hook in forward.items():
            selected = [(name, module) for name, module in model.named_modules() if hook.selects(name, module)]
            if not selected:
                rule = f"finds nothing to observe in a {type(model).__name__}; switch it off, or let it select modules"
                raise ConfigError("hooks.forward", hook_name, rule)
            self._handles += [m.register_forward_hook(_module_hook(hook_name, hook, name)) for name, m in selected]

    def __bool__(self) -> bool:
        return bool(self.names)

    def apply_update(self, step: int, parameters: Sequence[nn.Parameter]) -> None:
        """Give every update hook the gradients of this step, which it may change in place.

        Args:
            step: steps done before this one.
            parameters: all trained parameters, in the order of ``model.parameters()``.
        """
        if not self._update:
            return
        named = zip(self._parameter_names, parameters, strict=True)
        gradients = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
        with torch.no_grad():
            for hook in self._update.values():
                hook(step, gradients)

    def scalars(self) -> dict[str, float]:
        """Return the numbers of all forward hooks; waits for the device."""
        return {name: value for hook in self._forward.values() for name, value in hook.scalars().items()}

    def close(self) -> None:
        """Detach the hooks from the model; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()


def _module_hook(hook_name: str, hook: ForwardHook, name: str) -> Callable[[nn.Module, Any, Any], None]:
    """Return what ``register_forward_hook`` of module ``name`` takes."""

    def observe(module: nn.Module, _inputs: Any, output: Any) -> None:
        if module.training:
            versions = _versions(output)
            with torch.no_grad():
                hook.observe(name, output)
            if _versions(output) != versions:
                raise RuntimeError(f"forward hook {hook_name!r} changed the output of {name!r}; let it write to a copy")

    return torch.compiler.disable(observe)  # type: ignore[no-untyped-call, no-any-return]


def _versions(output: Any) -> list[int]:
    """Return how often each tensor of an output was written to; torch counts that on the host."""
    values: Iterable[Any] = output if isinstance(output, tuple | list) else (output,)
    return [value._version for value in values if isinstance(value, Tensor)]


def build_hooks(config: HooksConfig, model: nn.Module) -> Hooks:
    """Build the configured hooks and attach them to ``model`` (unwrapped).

    Raises:
        ConfigError: an unknown name, an import path that leads nowhere, or a factory that makes no hook.
    """
    forward = {name: _build("hooks.forward", name, FORWARD_HOOKS, model) for name in config.forward}
    update = {name: _build("hooks.update", name, UPDATE_HOOKS, model) for name in config.update}
    for name, hook in forward.items():
        if not isinstance(hook, ForwardHook):
            rule = f"makes a {type(hook).__name__}, which is no {__name__}.ForwardHook; derive it from that"
            raise ConfigError("hooks.forward", name, rule)
    for name, hook in update.items():
        if not callable(hook):
            rule = f"makes a {type(hook).__name__}, which cannot be called as hook(step, gradients)"
            raise ConfigError("hooks.update", name, rule)
    return Hooks(model, forward, update)


def _build(field: str, name: str, registry: Mapping[str, Callable[[nn.Module], Any]], model: nn.Module) -> Any:
    if name in registry:
        return registry[name](model)
    path, _, attribute = name.partition(":")
    if not (path and attribute):
        raise ConfigError(field, name, f"is no hook; use one of {', '.join(registry)}, or package.module:factory")
    factory = import_by_path(field, name)
    if not callable(factory):
        raise ConfigError(field, name, f"is no factory: {attribute!r} cannot be called")
    return factory(model)
