"""Checks of the generators' settings."""

from __future__ import annotations

from numbers import Integral, Real


def check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    """Refuse what is no integer of at least ``least``, and at most ``most``.

    Raises:
        ValueError: It names the argument, the value and what would be right.
    """
    fits = isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value)
    if not fits or (most is not None and value > most):  # type: ignore[operator]
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}={value!r} must be an integer {wanted}")


def check_share(name: str, value: object) -> None:
    """Refuse what is no number from 0 to 1.

    Raises:
        ValueError: It names the argument, the value and what would be right.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) <= 1:
        raise ValueError(f"{name}={value!r} must be a number from 0 to 1")
