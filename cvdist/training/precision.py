"""Arithmetic that suits the processor."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from cvdist.config import Precision


@dataclass(frozen=True)
class Arithmetic:
    """How forward passes compute on a device. `reason` says for the log why this was chosen."""

    device_type: str
    bfloat16: bool
    reason: str

    @property
    def name(self) -> str:
        """As `--precision` takes it."""
        return "bfloat16" if self.bfloat16 else "float32"

    def autocast(self) -> AbstractContextManager[object]:
        """Context for a forward pass. Weights, gradients and the optimiser stay float32."""
        return torch.autocast(self.device_type, dtype=torch.bfloat16) if self.bfloat16 else nullcontext()


def choose(precision: Precision, device: torch.device) -> Arithmetic:
    """bfloat16 autocast if asked for, or if left to us and the processor computes it natively."""
    if precision != "auto":
        return Arithmetic(device.type, precision == "bfloat16", "as set by --precision")
    if _native_bfloat16(device):
        return Arithmetic(device.type, True, f"this {device.type.upper()} computes bfloat16 natively")
    return Arithmetic(device.type, False, f"this {device.type.upper()} has no native bfloat16")


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.backends.cpu.get_cpu_capability() if hasattr(torch.backends, "cpu") else ""
    if "AVX512" not in capabilities:
        return False
    # No public function tells this yet; if the private one goes, float32 is the safe answer.
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())
