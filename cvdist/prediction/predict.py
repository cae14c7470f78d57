"""Compute the result file of a work unit: decode its pictures, and run the model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cvdist.config import InferenceConfig
from cvdist.data.images.ahead import BATCH, DecodeAhead, stacked
from cvdist.data.images.decode import to_gray
from cvdist.data.normalize import Normalizer
from cvdist.data.quarantine import BadPicture
from cvdist.distributed.precision import choose_precision
from cvdist.models.servable import log_probabilities
from cvdist.prediction import results
from cvdist.resumable_map import UnitResult, WorkUnit
from cvdist.saved import SavedModel


class Predictor:
    """Runs a model on pictures. It is thread-safe."""

    def __init__(
        self,
        data: str,
        inference: InferenceConfig,
        saved: SavedModel,
        device: torch.device,
        *,
        decode_threads: int = 0,
    ) -> None:
        """Copy the model to the device and start the decoding threads.

        Args:
            data: folder or URI of the pictures.
            inference: settings, in which `resize` and `precision` must not be left to the model.
            saved: the model.
            device: where the model runs.
            decode_threads: number of threads that decode pictures; 0 means one per core.

        Raises:
            UserError: if the URI is invalid.
        """
        self._identity, self._thresholds = saved.identity, saved.thresholds
        self._device = device
        self.precision = choose_precision(inference.precision, device)
        layout = torch.channels_last if inference.channels_last else torch.contiguous_format
        self.module = _prepared(saved.model, device, layout, bfloat16=self.precision.half is torch.bfloat16)
        self._normalize = Normalizer(saved.mean, saved.std, device, channels_last=inference.channels_last)
        self._batch = BATCH[device.type]
        self._ahead = DecodeAhead(
            data,
            saved.identity.height,
            inference.resize,
            threads=decode_threads,
            timeout=inference.data_timeout,
            processes=device.type == "cuda",
        )
        self._computing = threading.Lock()

    def __call__(self, unit: WorkUnit) -> UnitResult:
        """Predict the pictures of a work unit, as a result file.

        Raises:
            UserError: if a picture can't be read.
        """
        logarithms, paths, bad = self.log_probabilities(unit.paths)
        content, counts = results.dump(paths, logarithms.exp_(), self._identity, self._thresholds, bad)
        return UnitResult(content, bad, {"counts": counts})

    def log_probabilities(self, paths: Sequence[str]) -> tuple[Tensor, list[str], list[BadPicture]]:
        """Predict pictures.

        Returns:
            Log-probabilities, which keep small values exact, float32 (n, classes) on the CPU, of the n pictures
            that can be decoded; their paths; and the pictures that can't be decoded.

        Raises:
            UserError: if a file can't be read.
        """
        found: list[Tensor] = []
        good: list[str] = []
        bad: list[BadPicture] = []
        for first, decoded in self._ahead.batches(paths, self._batch):
            named = list(zip(paths[first : first + len(decoded)], decoded, strict=True))
            bad += [BadPicture(path, one.reason) for path, one in named if one.pixels is None]
            good += [path for path, one in named if one.pixels is not None]
            pixels = [one.pixels for one in decoded if one.pixels is not None]
            if pixels:
                batch = stacked(pixels, self._device)
                with self._computing:
                    found.append(self._compute(batch))
        # On a GPU, the results of all batches have been on their way until here.
        return torch.cat(found).cpu() if found else torch.empty(0, len(self._identity.classes)), good, bad

    def _compute(self, pixels: Tensor) -> Tensor:
        """Compute log-probabilities, float32 (n, classes) on the device, from pixels uint8 (n, H, W, 3)."""
        pictures = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2).float()
        if self._identity.channels == 1:
            pictures = to_gray(pictures)
        with torch.inference_mode(), self.precision.autocast():
            scores = self.module(self._normalize(pictures))
        return log_probabilities(scores, multilabel=self._identity.multilabel)


def _prepared(
    model: nn.Module, device: torch.device, layout: torch.memory_format, *, bfloat16: bool
) -> nn.Module:
    """Copy the model to this device. For bfloat16 it is cast once, as autocast would do for each batch."""
    copied = copy.deepcopy(model)
    if bfloat16:
        for layer in copied.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.to(torch.bfloat16)
    return copied.to(device).to(memory_format=layout)
