"""Whether what a job runs on is there, without importing it."""

from __future__ import annotations

import importlib.util

from cvdist.errors import UserError


def require_ray(otherwise: str) -> None:
    """Refuse to go on without Ray; `otherwise` says what can be done instead.

    Raises:
        UserError: if Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            f"Ray is not installed: pip install 'ray[default,train,data]', or, without it, {otherwise}"
        )
