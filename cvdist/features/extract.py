"""Computes the shard of a work unit: decodes its pictures, and runs the frozen layers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cvdist import models
from cvdist.config import PreprocessConfig
from cvdist.data.augment import Augmentation
from cvdist.data.forms import VALID_PART, root_of
from cvdist.data.images.ahead import BATCH, DecodeAhead, Pictures, stacked
from cvdist.data.images.measures import measure
from cvdist.data.images.on_gpu import GpuDecoder
from cvdist.data.normalize import Normalizer
from cvdist.data.quarantine import BadPicture
from cvdist.distributed.precision import choose_precision
from cvdist.errors import UserError
from cvdist.features import fingerprint as fingerprints
from cvdist.features import shard
from cvdist.features.fingerprint import Fingerprint
from cvdist.log import redact
from cvdist.models import FrozenBackbone
from cvdist.resumable_map import UnitResult, WorkUnit


class Extractor:
    """Runs a model's frozen layers over work units. It is thread-safe."""

    def __init__(
        self,
        config: PreprocessConfig,
        fingerprint: Fingerprint,
        device: torch.device,
        *,
        decode_threads: int = 0,
        backbone: FrozenBackbone | None = None,
        pictures: Pictures | None = None,
    ) -> None:
        """Prepare to compute on `device`.

        Args:
            config: All settings.
            fingerprint: Fingerprint of the features that are asked for.
            device: Where to compute.
            decode_threads: Threads that decode pictures. 0: one for each core.
            backbone: The frozen layers, if they need not be built from the weights that `config` names.
            pictures: The pictures, if they are not to be read from the files below `--data`.

        Raises:
            UserError: if the weights on this machine differ from those of the fingerprint.
        """
        self._device, self._views = device, fingerprint.views
        backbone = backbone or models.build_frozen(config.model, fingerprint.size)
        if fingerprints.digest(backbone.module.state_dict()) != fingerprint.weights:
            raise UserError(
                f"--weights {redact(config.model.weights)} is another file on this node than where the job "
                "was started: name a URI, or copy it to all nodes"
            )
        layout = torch.channels_last if config.compute.channels_last else torch.contiguous_format
        self.module = backbone.module.to(device).to(memory_format=layout)
        self.precision = choose_precision(config.compute.precision, device)
        self._normalize = Normalizer(
            fingerprint.mean, fingerprint.std, device, channels_last=config.compute.channels_last
        )
        self._mean, augmented = fingerprint.mean, fingerprint.augmentation
        self._augmentation = Augmentation(**augmented) if augmented else None  # type: ignore[arg-type]
        self._dtype = shard.DTYPES[fingerprint.dtype]
        self._shape = backbone.feature_shape(3, fingerprint.size, fingerprint.size)
        self._batch = BATCH[device.type]
        self._pictures = pictures or DecodeAhead(
            root_of(config.data),
            config.data.image_size,
            config.data.resize,
            threads=decode_threads,
            timeout=config.runtime.data_timeout,
            for_gpu=fingerprint.decoder == "nvjpeg",
            processes=device.type == "cuda",
        )
        self._decoder: GpuDecoder | None = None
        if fingerprint.decoder == "nvjpeg":
            self._decoder = GpuDecoder(device, config.data.image_size, config.data.resize)
            self._decoder.require()
        self._computing = threading.Lock()

    def __call__(self, unit: WorkUnit) -> UnitResult:
        """Compute the shard of a work unit.

        Raises:
            UserError: if a file can't be read, or a value overflows its dtype.
        """
        valid = unit.pictures["part"][0] == VALID_PART
        features, digests, bad, measured = self.compute(unit.paths, 1 if valid else self._views)
        excluded = {picture.path for picture in bad}
        good = [path for path in unit.paths if path not in excluded]
        values: dict[str, Any] = {"digests": [digest.hex() for digest in digests], "measures": measured}
        if not good:
            return UnitResult(None, bad, values)
        packed = shard.pack(features[: len(good)], good)
        values["shard"] = {name: value for name, value in vars(packed).items() if name != "content"}
        return UnitResult(packed.content, bad, values)

    def compute(
        self, paths: Sequence[str], views: int
    ) -> tuple[Tensor, list[bytes], list[BadPicture], list[list[float]]]:
        """Read, decode and compute pictures.

        Args:
            paths: paths of n pictures.
            views: number of views of each.

        Returns:
            Features (n, views, ...), in which the good pictures come first; the digest of each picture; the
            pictures that can't be decoded; and the `MEASURES` of each good picture.

        Raises:
            UserError: if a file can't be read, or a value overflows its dtype.
        """
        pinned = self._device.type == "cuda"
        features = torch.empty(len(paths), views, *self._shape, dtype=self._dtype, pin_memory=pinned)
        digests: list[bytes] = []
        bad: list[BadPicture] = []
        finite: list[tuple[str, Tensor]] = []
        sizes: list[tuple[float, float]] = []
        looks: list[Tensor] = []
        good = 0
        for first, decoded in self._pictures.batches(paths, self._batch):
            if self._decoder is not None:
                with self._computing:
                    decoded = self._decoder(decoded)
            digests += [one.digest for one in decoded]
            named = list(zip(paths[first : first + len(decoded)], decoded, strict=True))
            bad += [BadPicture(path, one.reason) for path, one in named if one.pixels is None]
            pixels = [one.pixels for one in decoded if one.pixels is not None]
            if not pixels:
                continue
            names = [path for path, one in named if one.pixels is not None]
            contents = [one.digest.hex() for one in decoded if one.pixels is not None]
            sizes += [(one.width, one.height) for one in decoded if one.pixels is not None]
            images = stacked(pixels, self._device).to(self._device, non_blocking=True)
            # Held while work is handed to the GPU, not until it is done, so that another thread can follow.
            with self._computing:
                stored = self._compute(images, contents, views)
                looks.append(measure(images).to("cpu", non_blocking=True))
                finite.append((names[0], stored.isfinite().all().to("cpu", non_blocking=True)))
                features[good : good + len(pixels)].copy_(stored, non_blocking=True)
                done = torch.cuda.Event() if pinned else None
                if done is not None:
                    done.record()
            good += len(pixels)
        if finite and done is not None:
            done.synchronize()
        for name, all_are in finite:
            if not all_are:
                raise UserError(
                    f"--features-dtype {str(self._dtype).removeprefix('torch.')} can't hold the features of "
                    f"{name} and others: choose bfloat16 or float32"
                )
        shown = (row for part in looks for row in part.tolist())
        measures = zip(sizes, shown, strict=True)
        measured = [[*size, *(round(value, 4) for value in look)] for size, look in measures]
        return features, digests, bad, measured

    def _compute(self, pixels: Tensor, digests: list[str], views: int) -> Tensor:
        """Compute features (n, views, ...) from uint8 (n, H, W, C), on the device, in the stored dtype."""
        plain = pixels.permute(0, 3, 1, 2).float()
        computed = []
        for view in range(views):
            images = plain.clone() if views > 1 else plain
            if view and self._augmentation is not None:
                draws = torch.stack([self._augmentation.draw_view(digest, view) for digest in digests])
                images = self._augmentation.apply(images, draws, self._mean)
            with torch.inference_mode(), self.precision.autocast():
                computed.append(self.module(self._normalize(images)))
        return torch.stack(computed, dim=1).to(self._dtype)
