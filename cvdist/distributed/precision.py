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
    tf32: bool = False

    @property
    def name(self) -> str:
        """As `--precision` takes it."""
        return "bfloat16" if self.bfloat16 else "tf32" if self.tf32 else "float32"

    def autocast(self) -> AbstractContextManager[object]:
        """Context for a forward pass. Weights, gradients and the optimiser stay float32."""
        return torch.autocast(self.device_type, dtype=torch.bfloat16) if self.bfloat16 else nullcontext()


def choose(precision: Precision, device: torch.device) -> Arithmetic:
    """bfloat16 autocast if asked for, or if left to us and the processor computes it natively.

    TF32 is set for the process as a whole: it is not a property of a forward pass, the backward one has it too.
    """
    tf32 = precision == "tf32" and device.type == "cuda"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if tf32:
        return Arithmetic(device.type, False, "as set by --precision", tf32=True)
    if precision == "tf32":
        return Arithmetic(device.type, False, "TF32 is for GPUs only")
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
