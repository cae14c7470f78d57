"""The choice of a precision."""

from __future__ import annotations

import torch

from cvdist.distributed.precision import choose_precision


def test_only_a_training_on_a_gpu_takes_float16_by_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    gpu = torch.device("cuda", 0)
    assert choose_precision("auto", gpu, training=True).name == "float16"
    assert choose_precision("auto", gpu).name == "float32"
    assert not choose_precision("float32", gpu, training=True).scaler().is_enabled()
