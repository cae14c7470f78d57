"""The number formats that forward passes compute in, chosen to suit the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from cvdist.config import PrecisionName

_HALF: dict[PrecisionName, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The number format of forward passes on one kind of device.

    Attributes:
        device_type: `cpu` or `cuda`.
        half: the dtype of 16 bits that forward passes are cast to; None if they stay float32.
        reason: why this precision was chosen, for the log.
        tf32: whether float32 matrix products use TF32, which has 10 bits of mantissa.
    """

    device_type: str
    half: torch.dtype | None
    reason: str
    tf32: bool = False

    @property
    def name(self) -> str:
        """The value of `--precision` that stands for this precision."""
        if self.half is not None:
            return str(self.half).removeprefix("torch.")
        return "tf32" if self.tf32 else "float32"

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for a forward pass. Weights, gradients and optimizer state stay float32."""
        return torch.autocast(self.device_type, dtype=self.half) if self.half is not None else nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """Return a scaler of losses, so that gradients fit float16. In other precisions it does nothing."""
        return torch.amp.GradScaler(self.device_type, enabled=self.half is torch.float16)


def choose_precision(name: PrecisionName, device: torch.device, *, training: bool = False) -> Precision:
    """Choose the precision that `--precision` asks for, as far as the device has it.

    `auto` means bfloat16 where the device computes it natively. Elsewhere it means float16 to train on a GPU,
    where gradients are scaled and losses watched, and float32 otherwise. TF32 is set for the
    whole process, because the backward pass has to use it as well.

    Args:
        name: The value of `--precision`.
        device: The device that computes.
        training: Whether the device is to train.
    """
    tf32 = name == "tf32" and device.type == "cuda"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if tf32:
        return Precision(device.type, None, "as set by --precision", tf32=True)
    if name == "tf32":
        return Precision(device.type, None, "TF32 is for GPUs only")
    if name != "auto":
        return Precision(device.type, _HALF.get(name), "as set by --precision")
    if _native_bfloat16(device):
        return Precision(device.type, torch.bfloat16, f"this {device.type.upper()} computes bfloat16 natively")
    half = torch.float16 if training and device.type == "cuda" else None
    return Precision(device.type, half, f"this {device.type.upper()} has no native bfloat16")


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # What PyTorch uses, and what the processor has; a PyTorch that can't tell takes float32, which is safe.
    used = "AVX512" in torch.backends.cpu.get_cpu_capability() and hasattr(torch.cpu, "get_capabilities")
    return used and bool(torch.cpu.get_capabilities().get("avx512_bf16"))
