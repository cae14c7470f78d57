"""What holds for unit tests alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="module")
def threads_decode() -> Iterator[None]:
    """Processes take seconds to start: `tests/integration/test_odd_pictures.py` has them."""
    from cvdist.data.images.ahead import DecodeAhead  # pytest's first process need not wait for PyTorch

    begin = DecodeAhead.__init__

    def without_processes(self: DecodeAhead, *arguments: Any, processes: bool = False, **more: Any) -> None:
        begin(self, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeAhead, "__init__", without_processes)
        yield
