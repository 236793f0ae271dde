"""Allowed values of settings, declared by annotations and checked from these.

A signature contains ``lr: NotNegative = 2e-3``, which :func:`check_settings` evaluates. Flags
(``bool``) and choices (``Literal``) are checked by their annotation as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from scvi_sams._checks import check_bool, check_choice, check_integer, check_number


def number(**bounds: float) -> Callable[[str, object], None]:
    """Check of a number, for ``Annotated``; bounds as in :func:`check_number`."""
    return lambda name, value: check_number(**bounds, **{name: value})  # type: ignore[arg-type]


def _whole(name: str, value: object) -> None:
    check_integer(**{name: value})  # type: ignore[arg-type]


WholeNumber = Annotated[int, _whole]
PositiveNumber = Annotated[float, number(above=0)]
NotNegative = Annotated[float, number(at_least=0)]
Share = Annotated[float, number(above=0, below=1)]


def check_settings(function: Callable[..., Any], settings: Mapping[str, object]) -> None:
    """Raise an InvalidArgumentError if a setting does not fit the signature of ``function``.

    Settings that are not in the signature, and annotations without a range, are ignored. ``None``
    is accepted if the annotation has it.
    """
    hints = get_type_hints(function, include_extras=True)
    for name, value in settings.items():
        if name in hints:
            _check(name, value, hints[name])


def _check(name: str, value: object, hint: Any) -> None:
    if type(None) in get_args(hint):
        if value is not None:
            for choice in get_args(hint):
                _check(name, value, choice)
    elif hint is bool:
        check_bool(**{name: value})
    elif get_origin(hint) is Literal:
        check_choice(name, value, get_args(hint))
    elif get_origin(hint) is Annotated:
        for check in hint.__metadata__:
            check(name, value)


def given(scope: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a method from its ``locals()``, taken before any other assignment."""
    return {name: value for name, value in scope.items() if name not in ("self", "__class__")}
