"""Computes the shard of a work unit: decodes its pictures, runs the frozen layers, and stores the features."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from cvdist import models
from cvdist.config import PreprocessConfig
from cvdist.data.augment import Augmentation
from cvdist.data.dataset import to_device
from cvdist.data.images.ahead import BATCH, DecodeAhead, Pictures, stacked
from cvdist.data.images.on_gpu import GpuDecoder
from cvdist.data.normalize import Normalizer
from cvdist.distributed.precision import choose_precision
from cvdist.errors import UserError
from cvdist.features import fingerprint as fingerprints
from cvdist.features import receipt, shard
from cvdist.features.fingerprint import Fingerprint
from cvdist.features.manifest import ShardEntry
from cvdist.features.plan import WorkUnit
from cvdist.features.receipt import Receipt
from cvdist.log import redact
from cvdist.models import FrozenBackbone
from cvdist.storage import Folder


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
            fingerprint: What was asked for.
            device: Where to compute.
            decode_threads: Threads that decode pictures. 0: one for each core.
            backbone: The frozen layers, if they need not be built from the weights that `config` names.
            pictures: The pictures, if they are not to be read from the files below `--data`.

        Raises:
            UserError: if the weights here are others than those of the fingerprint.
        """
        self._config, self._device = config, device
        backbone = backbone or models.build_frozen(config.model)
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
        augmented = fingerprint.augmentation
        self._augmentation = Augmentation(**augmented) if augmented else None  # type: ignore[arg-type]
        self._dtype = shard.DTYPES[fingerprint.dtype]
        self._shape = backbone.feature_shape(3, fingerprint.size, fingerprint.size)
        self._batch = BATCH[device.type]
        self._pictures = pictures or DecodeAhead(
            config.data.uri,
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
        self._target = Folder.open(config.features.uri, "--features", patient=True)
        self._computing = threading.Lock()

    def __call__(self, work: WorkUnit) -> Receipt:
        """Compute and store the shard of a work unit, unless it is stored already.

        Raises:
            UserError: if a file can't be read, the shard can't be written, or a value overflows its dtype.
        """
        done = receipt.find(self._target, work.key)
        if done is not None:  # by an actor that died right after
            return done
        features, digests, bad = self.compute(work)
        excluded = {position for position, _ in bad}
        good = [position for position in range(len(work.paths)) if position not in excluded]
        entry = None
        if good:
            packed = shard.pack(
                features[: len(good)],
                [work.labels[position] for position in good],
                [work.paths[position] for position in good],
            )
            # Named by its contents too: two jobs that compute the same slice can't spoil each other's.
            name = f"shards/{work.key}-{packed.sha256[:16]}{shard.SUFFIX}"
            self._target.write(name, packed.content)
            entry = ShardEntry(
                object=name,
                rows=packed.rows,
                views=packed.views,
                stored_bytes=len(packed.content),
                raw_bytes=packed.raw_bytes,
                sha256=packed.sha256,
                raw_sha256=packed.raw_sha256,
                zeros=packed.zeros,
            )
        done = Receipt(work.key, entry, tuple(digests), tuple(bad))
        self._target.write(receipt.name_of(work.key), receipt.dump(done))
        return done

    def compute(self, work: WorkUnit) -> tuple[Tensor, list[bytes], list[tuple[int, str]]]:
        """Read, decode and compute the pictures of a work unit.

        Returns:
            Features (pictures, views, ...), in which the good pictures come first; the digest of each picture;
            and the position and reason of each picture that can't be decoded.
        """
        pinned = self._device.type == "cuda"
        features = torch.empty(len(work.paths), work.views, *self._shape, dtype=self._dtype, pin_memory=pinned)
        digests: list[bytes] = []
        bad: list[tuple[int, str]] = []
        finite: list[tuple[str, Tensor]] = []
        good = 0
        for first, decoded in self._pictures.batches(work.paths, self._batch):
            if self._decoder is not None:
                with self._computing:
                    decoded = self._decoder(decoded)
            digests += [one.digest for one in decoded]
            bad += [(first + i, one.reason) for i, one in enumerate(decoded) if one.pixels is None]
            pixels = [one.pixels for one in decoded if one.pixels is not None]
            if not pixels:
                continue
            names = [work.paths[first + i] for i, one in enumerate(decoded) if one.pixels is not None]
            images = stacked(pixels, self._device)
            # Held while a GPU's work is handed over, not until it is done: another thread's comes next.
            with self._computing:
                stored = self._compute(images, names, work.views)
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
        return features, digests, bad

    def _compute(self, pixels: Tensor, names: list[str], views: int) -> Tensor:
        """uint8 (n, H, W, C) to features (n, views, ...) on the device, in the stored dtype."""
        plain = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2).float()
        computed = []
        for view in range(views):
            images = plain.clone() if views > 1 else plain
            if view and self._augmentation is not None:
                draws = torch.stack([self._augmentation.draw_view(name, view) for name in names])
                images = self._augmentation.apply(images, to_device(draws, self._device))
            with torch.inference_mode(), self.precision.autocast():
                computed.append(self.module(self._normalize(images)))
        return torch.stack(computed, dim=1).to(self._dtype)
