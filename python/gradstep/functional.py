"""What the functions share: settings by keyword, states in the caller's hands, one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradstep import _core
from gradstep.options import FunctionOptions, make_conditions, refuse_chance, refuse_keeping

if TYPE_CHECKING:
    from gradstep.numpy import Optimizer


def update(
    function: str,
    optimizer: type[Optimizer],
    params: Any,
    grads: Any,
    states: tuple[Any, ...],
    step: Any,
    settings: Mapping[str, Any],
    grad_scale: float,
    options: Mapping[str, Any],
) -> bool | None:
    """Perform one step of the rule that `optimizer` takes for these settings.

    Args:
        function: the name of the function that was called, for messages.
        optimizer: the class of the same rule: it turns settings into a kernel.
        params, grads, states, step: as the function got them; the states in the order of the rule's.
        settings: of the rule, by the names of the optimizer's.
        grad_scale: number that the gradients are multiplied by.
        options: keywords that the function got beside its own.

    Returns:
        None, or if the step may be left out, whether it was carried out.
    """
    conditions = None
    if options:
        unknown = [name for name in options if name not in FunctionOptions.__annotations__]
        if unknown:
            raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")
        settings = {**settings, **options}
    try:
        if options:
            conditions = make_conditions(options)
            refuse_keeping(options)
            if step is None:
                refuse_chance(options)
        kernel = optimizer.kernel(settings, grad_scale)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{function}: {error}") from None
    return _core.update(function, kernel, params, grads, states, step, conditions)
