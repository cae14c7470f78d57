"""The training loop, the same under every runtime.

Reads from top to bottom: set up, go on from a checkpoint if there is one, then for each epoch train, validate
and save. How a step is divided over the workers is `cvdist.parallel`'s.
"""

from __future__ import annotations

import functools
import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cvdist import loaders, log, models, parallel, slow_requests, storage
from cvdist.checkpoints import format as ckpt
from cvdist.checkpoints import shards as ckpt_parts
from cvdist.checkpoints.format import Checkpoint, DamagedCheckpoint, Normalisation, OrderIdentity, Progress
from cvdist.config import TrainConfig
from cvdist.data.dataset import Batch
from cvdist.data.sampler import EpochOrder
from cvdist.distributed import precision
from cvdist.distributed.collectives import (
    annotate_collective_errors,
    gather,
    raise_on_all_ranks,
    set_group_timeout,
)
from cvdist.distributed.device import describe, peak_memory, random_state, set_random_state
from cvdist.distributed.tensor_shard import TensorShard
from cvdist.distributed.worker import StopRequest, Worker
from cvdist.errors import UserError
from cvdist.results import EpochRecord, Evaluation, ModelIdentity, Summary
from cvdist.seeding import derive_seed
from cvdist.slow_requests import NO_SLOW_REQUESTS
from cvdist.tracking.tracker import Tracker
from cvdist.training import average, compiling, reporting, ridge
from cvdist.training.evaluation import evaluate
from cvdist.training.finite import LossWatch, require_finite_weights
from cvdist.training.meter import Meter
from cvdist.training.optimizer import build_optimizer, learning_rate, restore_optimizer, set_learning_rate
from cvdist.training.visualize import Visualizer

logger = logging.getLogger(__name__)

_LOGGED = 500  # step metrics that a checkpoint remembers


class TrainingLoop:
    """One worker's part of a run."""

    def __init__(self, config: TrainConfig, worker: Worker, tracker: Tracker) -> None:
        """Load data, build the model, and go on from the latest checkpoint if there is one.

        Raises:
            UserError: on every worker, if data, model or checkpoint are not what the configuration says.
        """
        self.config, self.worker, self.tracker = config, worker, tracker
        self.main = worker.rank == 0
        self.line = log.ProgressLine(logger, enabled=self.main)
        self.arithmetic = precision.choose(config.loop.precision, worker.device)
        with raise_on_all_ranks(config.runtime.prepare_timeout):
            if worker.local_rank == 0:
                loaders.prepare(config)
                models.prepare(config.model)
        with raise_on_all_ranks():
            expected = models.preprocessing(config.model)
            self.loader = loaders.open_loader(
                config,
                worker.device,
                workers_on_node=worker.local_world_size,
                normalisation=(expected.mean, expected.std) if expected else None,
            )
            self.info = self.loader.info
            self.model = self._build_model()
            self.visualizer = Visualizer(config, self.model, tracker, enabled=self.main)
        self._require_same_data()
        self.parts = models.split(self.model)
        # From a cache, what the frozen layers make of the pictures comes instead of the pictures.
        self.frozen = None if self.loader.features else self.parts.frozen
        self.parts.trained.to(worker.device)
        if self.frozen is not None:
            self.frozen.to(worker.device)
        self.trained_parameters = sum(p.numel() for p in self.parts.trained.parameters())
        self.all_parameters = sum(p.numel() for p in self.model.parameters())
        self.identity = ModelIdentity(
            config.model.model,
            self.info.classes,
            self.info.channels,
            self.info.height,
            self.info.width,
            *models.head_of(config.model),
        )
        self.order = OrderIdentity(self.info.train_size, config.loop.batch_size, config.loop.seed)
        self.progress = Progress()
        self.best: Evaluation | None = None
        self.resumed = ""
        with self._opened_checkpoint() as found:
            # Whether it goes on from another run's checkpoint.
            self.adopted = found is not None and found[1] == config.checkpoint.resume
            recorded = found[0].parallel if found else ""
            self.division = parallel.choose(config, worker, self.parts, self.loader, self.arithmetic, recorded)
            self.mode = self.division.mode
            self._compile()
            self.optimizer = build_optimizer(
                self.parts.trained,
                config.optimizer,
                backbone=self.parts.backbone,
                backbone_lr_scale=config.model.backbone_lr_scale,
            )
            self.ema = self._build_average()
            # Each worker drops other activations; the weights above were drawn from a stream that all share.
            torch.manual_seed(derive_seed("dropout", config.loop.seed, self.mode.random_rank))
            if found:
                with raise_on_all_ranks():
                    self._load(*found)
        self.losses = LossWatch()
        self.first_step_at = 0.0

    # ---------------------------------------------------------------------------------------------- the run

    def run(self) -> Summary:
        """Train until all epochs are done, then log figures and the best model."""
        self._announce()
        self.tracker.log_dataset(self.info, self.loader.digest)
        if self.loader.quarantine:
            self.tracker.log_text("quarantine.csv", reporting.quarantine_table(self.loader.quarantine))
        self.tracker.log_figure("samples", reporting.samples_figure(self.loader))
        if self.loader.augmentation is not None:
            figure = reporting.augmentation_figure(self.loader, self.loader.augmentation)
            self.tracker.log_figure("augmentation", figure)
        fresh = not (self.progress.epoch or self.progress.position)
        self.visualizer.start(self._validated_model(), fresh=fresh)
        if self.adopted and self.progress.history and not self.progress.position:
            # It may stay the best, and this run's best model is one of its own checkpoints.
            self._save(f"epoch-{self.progress.epoch:04}", score=self.progress.history[-1].score)
        # A killed attempt may not have delivered these; what is there already, the tracker leaves out.
        self._probe()
        for step, values in self.progress.logged:
            self.tracker.log_metrics(values, step)
        for record in self.progress.history:
            self.tracker.log_metrics(reporting.epoch_metrics(record), record.epoch)
        for epoch in range(self.progress.epoch + 1, self.config.loop.epochs + 1):
            started = time.monotonic()
            train_loss, train_correct, speed = self._train_epoch(epoch)
            result = self._validate()
            seconds = time.monotonic() - started
            waited = sum(gather(slow_requests.meter.take()), NO_SLOW_REQUESTS)
            record = EpochRecord(
                epoch=epoch,
                train_loss=train_loss,
                train_correct=train_correct,
                train_total=self.info.train_size,
                valid_loss=result.loss,
                valid_correct=result.correct,
                valid_total=result.total,
                learning_rate=self._learning_rate(epoch, 0),
                seconds=seconds,
                samples_per_second=speed,
                peak_memory=peak_memory(self.worker.device),
                storage_slow=waited.slow,
                storage_failed=waited.failed,
                storage_seconds=waited.seconds,
            )
            self._finish_epoch(record, result)
            self.visualizer.epoch_done(self._validated_model(), epoch)
            self._save(f"epoch-{epoch:04}", score=record.score)
            self.tracker.log_metrics(reporting.epoch_metrics(record), epoch)
        self._log_results()
        return self._summary()

    def _probe(self) -> None:
        """What a linear classifier in closed form makes of the features: seconds, and computed once a run."""
        worker, progress = self.worker, self.progress
        if self.config.features.ridge_probe and progress.ridge is None:
            progress.ridge = ridge.probe(self.loader, worker.rank, worker.world_size, worker.device, self.line)
            if self.main and progress.ridge is not None:
                logger.info("baseline   ridge probe %s", progress.ridge)
        if progress.ridge is not None:
            self.tracker.log_metrics(reporting.ridge_metrics(progress.ridge), 0)

    def _train_epoch(self, epoch: int) -> tuple[float, int, float]:
        """One pass over the training data, from where the last checkpoint left it.

        Returns the mean loss, the number of correct predictions and samples a second, over all workers.
        """
        config, worker, progress = self.config, self.worker, self.progress
        mode = self.mode
        if not progress.position:
            progress.shuffle = self.loader.shuffle(mode.world_size)
        order = self.loader.epoch_order(config.loop, epoch, progress.shuffle)
        steps = order.steps()
        step = steps - order.steps(progress.position)
        mode.align()
        meter = Meter(worker.device, mode.traffic)
        began, began_at = time.monotonic(), progress.position
        batches = self.loader.train_batches(order, mode.rank, mode.world_size, progress.position)
        mode.replica.train()
        for batch in meter.waiting_for(batches):
            rate = self._learning_rate(epoch - 1, progress.position)
            with annotate_collective_errors(worker.rank, epoch, step + 1):
                self._step(batch, rate, meter)
                step += 1
                progress.position += batch.global_size
                if not self.first_step_at:
                    self.first_step_at = time.time()
                    set_group_timeout(config.runtime.step_timeout)
                asked = worker.poll_stop_request()
            save_now = asked or (
                config.checkpoint.checkpoint_every and step % config.checkpoint.checkpoint_every == 0
            )
            if step % config.loop.log_every_steps == 0 or step == steps or save_now:
                self._log_step(epoch, step, steps, rate, meter)
            if save_now and step < steps:
                self._save(f"epoch-{epoch:04}-step-{step:06}", score=ckpt.UNSCORED)
                self._obey(asked)
            if self.line.due():
                self._show_progress(epoch, step, steps, progress.position - began_at, began)
        self.line.clear()
        speed = (progress.position - began_at) / max(time.monotonic() - began, 1e-9)
        return progress.loss_sum / self.info.train_size, progress.correct, speed

    def _step(self, batch: Batch, rate: float, meter: Meter) -> None:
        """Forward, backward, update."""
        optimizer, config, mode = self.optimizer, self.config.optimizer, self.mode
        compiling.begin_step(self.config.loop.compile)
        set_learning_rate(optimizer, rate)
        losses: list[Tensor] = []
        for last, images, labels in self._portions(batch):
            with mode.portion(last=last):
                scores = self._scores(images).float()
                loss = F.cross_entropy(scores, labels, reduction="sum", label_smoothing=config.label_smoothing)
                # The gradient is to be that of the mean over the *global* batch. Shares may differ in size,
                # and an average divides by the number of workers, not by samples.
                (loss * (mode.world_size / batch.global_size)).backward()
            if mode.counts:
                meter.add(loss.detach(), scores.detach(), labels)
            losses.append(loss.detach())
        if config.clip_grad_norm:
            mode.clip(dict(self.parts.trained.named_parameters()), config.clip_grad_norm)
        self.losses.add(sum(losses[1:], losses[0]), batch.indices)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            average.update(self.ema, self.parts.trained, config.model_ema_decay)

    def _scores(self, images: Tensor) -> Tensor:
        """What the model says of normalised pictures; only the trained part leaves a graph."""
        with self.arithmetic.autocast():
            if self.frozen is not None:
                with torch.no_grad():
                    images = self.frozen(images)
            scores: Tensor = self.mode.replica(images)
        return scores

    def _portions(self, batch: Batch) -> Iterator[tuple[bool, Tensor, Tensor]]:
        """A share cut into `--accumulate-steps` parts of about equal size (fewer if a share is smaller than
        that).

        All workers have as many. An empty share is one empty portion: the worker still takes part in exchanges.
        """
        smallest = batch.global_size // self.mode.world_size
        parts = max(1, min(self.config.loop.accumulate_steps, smallest))
        if parts == 1:
            yield True, batch.images, batch.labels
            return
        cut = zip(batch.images.tensor_split(parts), batch.labels.tensor_split(parts), strict=True)
        for number, (images, labels) in enumerate(cut, start=1):
            yield number == parts, images, labels

    def _validate(self) -> Evaluation:
        batches = self.mode.valid_batches(self.loader, self.config.loop.valid_batch_size)
        result = evaluate(
            self._validated_part(),
            batches,
            len(self.info.classes),
            self.worker.device,
            self.arithmetic,
            counts=self.mode.counts,
        )
        if result.total != self.info.valid_size:
            raise RuntimeError(f"validated {result.total} of {self.info.valid_size} samples")
        return result

    # ------------------------------------------------------------------------------------------- setting up

    def _build_model(self) -> nn.Module:
        torch.manual_seed(derive_seed("weights", self.config.loop.seed))
        shape = models.InputSpec(self.info.channels, self.info.height, self.info.width)
        model = models.build_model(self.config.model, shape, len(self.info.classes))
        if self.config.loop.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return model

    def _build_average(self) -> AveragedModel | None:
        decay = self.config.optimizer.model_ema_decay
        if not decay:
            return None
        return average.build(self.parts.trained, decay)

    def _compile(self) -> None:
        # Not what is split: between its parts lie exchanges with other workers.
        trained = self.parts.trained if self.mode.name == "data" else None
        compiling.compile_parts(self.config.loop.compile, self.frozen, trained)

    def _validated_model(self) -> nn.Module:
        """The model for pictures. With a split head it has this worker's part of that."""
        return models.with_trained(self.model, self.ema.module) if self.ema is not None else self.model

    def _validated_part(self) -> nn.Module:
        """What of it takes the batches of the loader."""
        if not self.loader.features:
            return self._validated_model()
        return self.ema.module if self.ema is not None else self.parts.trained

    def _require_same_data(self) -> None:
        """Each node lists the data by itself: rows have to mean the same pictures on all of them.

        Raises:
            UserError: on every worker.
        """
        sizes = gather((self.info.train_size, self.info.valid_size, self.loader.digest()))
        if len(set(sizes)) > 1:
            raise UserError(
                f"the workers see different data in {self.info.source}: "
                + ", ".join(f"{train:,} + {valid:,} pictures ({sha[:8]})" for train, valid, sha in sizes)
                + "; was it changed while the job started? Start it again",
                on_all_workers=True,
            )

    def _learning_rate(self, epochs_done: int, position: int) -> float:
        epoch = epochs_done + position / self.info.train_size
        return learning_rate(self.config.optimizer, epoch, self.config.loop.epochs)

    # ------------------------------------------------------------------------------------------ checkpoints

    @contextmanager
    def _opened_checkpoint(self) -> Iterator[tuple[Checkpoint, str] | None]:
        """What to go on from, and its name in messages, while the context lasts; None for a fresh start.

        The newest checkpoint of this run that all workers can read; the ones before it are second choice.
        """
        names = gather(self.worker.checkpoints())[0]
        for name in names:
            damage = ""
            with ExitStack() as stack:
                with raise_on_all_ranks():
                    try:
                        folder = stack.enter_context(self.worker.open_checkpoint(name))
                        saved = self._read(folder, f"{name} of this run")
                    except DamagedCheckpoint as error:
                        damage = str(error)
                found = next(filter(None, gather(damage)), "")
                if not found:
                    yield saved, f"{name} of this run"
                    return
            if self.main:
                logger.warning("%s", found.replace("name another one", "trying the one before"))
        if names:
            raise UserError(
                "none of this run's checkpoints can be read: start under another --name, or from another run's "
                "with --resume",
                on_all_workers=True,
            )
        resume = self.config.checkpoint.resume
        if not resume:
            yield None
            return
        with ExitStack() as stack:
            with raise_on_all_ranks():
                saved = self._read(stack.enter_context(storage.local_copy(resume)), resume)
                saved.progress.ridge = None  # of another run, and maybe of other features
            yield saved, resume

    def _read(self, folder: Path, name: str) -> Checkpoint:
        return ckpt.load(folder, map_location=self.worker.device, name=name, whole=False)

    def _load(self, saved: Checkpoint, name: str) -> None:
        ckpt.require_fit(saved, self.identity, self.order, name)
        state = ckpt_parts.localise(saved.state, self._slice_of(), self.worker.device)
        self.model.load_state_dict(state["model"])
        restore_optimizer(self.optimizer, state["optimizer"], name)
        if self.ema is not None:
            self.ema.load_state_dict(state.get("ema") or self.ema.state_dict())
        states: list[dict[str, Tensor]] = state["rng"]
        rank = self.mode.random_rank
        # With a split head all workers draw what one process would.
        was_one = saved.parallel == "head" or len(states) == 1
        is_one = self.mode.name == "head" or self.worker.world_size == 1
        if was_one == is_one and (is_one or len(states) == self.worker.world_size):
            set_random_state(states[rank], self.worker.device)
        else:  # streams of as many workers as there are now, and not those that the run began with
            at = (saved.progress.epoch, saved.progress.position)
            torch.manual_seed(derive_seed("dropout", self.config.loop.seed, rank, *at))
        self.progress = saved.progress
        self.best = saved.best
        self.visualizer.load_state(state.get("visualizer"))
        if not self.main:
            # These are sums over all workers, and are going to be summed over them again.
            self.progress.loss_sum, self.progress.correct = 0.0, 0
        self.resumed = f"epoch {saved.progress.epoch + 1}, sample {saved.progress.position}"

    def _save(self, name: str, score: float) -> None:
        """Checkpoint, which is written while training goes on; all workers call it."""
        progress = self.progress
        at = progress.epoch * self.info.train_size + progress.position
        with raise_on_all_ranks():
            require_finite_weights(self.parts.trained, name)
        state = {
            "model": ckpt.model_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "rng": gather(random_state(self.worker.device)),
            "visualizer": self.visualizer.state(),
        }
        rank, count = self.worker.rank, self.worker.world_size
        split: dict[str, tuple[Tensor, TensorShard]] = {}
        if self.mode.slices:
            state, split = ckpt_parts.separate(state, self._slice_of())
            split = {
                path: (tensor.detach().to("cpu", copy=True), part) for path, (tensor, part) in split.items()
            }
        elif not self.main:
            self.worker.save_checkpoint(name, score, at, None)
            return
        whole: Checkpoint | None = None
        if self.main:
            pixels = Normalisation(self.info.mean, self.info.std)
            whole = ckpt.snapshot(
                Checkpoint(
                    self.identity,
                    self.order,
                    progress,
                    self.best,
                    state,
                    pixels,
                    parallel=self.mode.name,
                    workers=count if split else 0,
                )
            )

        def fill(folder: Path) -> None:
            if split:
                ckpt_parts.write(folder, rank, count, split)
            if whole is not None:
                ckpt.save(folder, whole)

        awaited = [ckpt_parts.names(count, other)[1] for other in range(1, count)] if split else []
        self.worker.save_checkpoint(name, score, at, fill, awaited)

    def _slice_of(self) -> ckpt_parts.TensorShardOf:
        """Which part of the training state this worker has."""
        names = {id(p): name for name, p in self.parts.trained.named_parameters()}
        order = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        return ckpt_parts.slices_by_path(self.mode.slices, order)

    def _obey(self, asked: StopRequest) -> None:
        """Leave if that is asked for, as soon as the checkpoint is stored."""
        if asked is not StopRequest.EXIT:
            return
        self.worker.wait_for_uploads()
        if self.main:
            name = self.config.checkpoint.name
            logger.info("stopped by SIGTERM after a checkpoint: --name %s goes on from it", name)
        sys.exit(128 + signal.SIGTERM)

    # ------------------------------------------------------------------------------------- telling about it

    def _announce(self) -> None:
        if not self.main:
            return
        config, worker = self.config, self.worker
        hardware = describe(worker.device)
        trained = self.trained_parameters
        frozen = self.all_parameters - trained
        origin = models.origin(self.model)
        count = self.mode.world_size
        shares = [len(range(config.loop.batch_size)[r::count]) for r in range(count)]
        each = str(shares[0]) if min(shares) == max(shares) else f"{min(shares)} to {max(shares)}"
        order = EpochOrder(self.info.train_size, config.loop.batch_size, seed=0, epoch=0)
        logger.info("data       %s", self.info)
        if self.loader.note:
            logger.info("features   %s", self.loader.note)
        logger.info(
            "model      %s, %s trained parameters%s",
            self.identity,
            f"{trained:,}",
            f", {frozen:,} frozen" if frozen else "",
        )
        if origin is not None:
            logger.info(
                "weights    %s, normalisation %s, sha256 %s",
                origin.source,
                origin.preprocessing.name,
                origin.digest[:16],
            )
            if origin.note:
                logger.info("           %s", origin.note)
        logger.info("workers    %d on %s", worker.world_size, hardware)
        logger.info("parallel   %s", self.division.note)
        layout = "channels_last" if config.loop.channels_last else "contiguous"
        logger.info("arithmetic %s, %s (%s)", self.arithmetic.name, layout, self.arithmetic.reason)
        logger.info(
            "batch      %d = %s on each of %d worker%s; %d steps an epoch, %d epochs",
            config.loop.batch_size,
            each,
            worker.world_size,
            "s" if worker.world_size > 1 else "",
            order.steps(),
            config.loop.epochs,
        )
        if self.resumed:
            logger.info("resuming   at %s, %d epochs done", self.resumed, self.progress.epoch)
        self.tracker.log_params(
            {
                "run.world_size": worker.world_size,
                "run.hardware": hardware,
                "run.precision": self.arithmetic.name,
                "run.parallel": self.mode.name,
                "run.parameters": trained,
                "run.frozen_parameters": frozen,
                "weights.sha256": origin.digest if origin else "",
                "weights.normalisation": origin.preprocessing.name if origin else "",
                "data.classes": len(self.info.classes),
                "data.mean": self.info.mean,
                "data.std": self.info.std,
            }
        )

    def _log_step(self, epoch: int, step: int, steps: int, rate: float, meter: Meter) -> None:
        """Reduce what has been measured since the last call, and refuse to go on with a broken loss."""
        found = meter.take()
        loss, correct, count = found.loss, found.correct, found.count
        self.losses.require_finite(loss, step, epoch, functools.partial(self.loader.names, "train"))
        self.progress.loss_sum += loss
        self.progress.correct += correct
        seconds = found.seconds / found.steps
        values = {
            "step/loss": loss / count,
            "step/accuracy": correct / count,
            "step/correct": correct,
            "step/total": count,
            "step/learning_rate": rate,
            "step/samples_per_second": count / found.seconds,
            "step/seconds": seconds,
            "step/data_seconds": found.data_seconds,
            "step/compute_seconds": found.compute_seconds,
            "step/communication_seconds": found.communication_seconds,
            "step/bytes_sent": found.bytes_sent,
            "step/roofline_fraction": self.division.min_step_seconds(round(count / found.steps)) / seconds,
        }
        at = (epoch - 1) * steps + step
        self.tracker.log_metrics(values, step=at)
        self.progress.logged = [*self.progress.logged[1 - _LOGGED :], (at, values)]

    def _show_progress(self, epoch: int, step: int, steps: int, samples: int, began: float) -> None:
        rate = samples / (time.monotonic() - began)
        left = (steps - step) * self.config.loop.batch_size
        left += (self.config.loop.epochs - epoch) * self.info.train_size
        self.line.show(
            f"epoch {epoch}/{self.config.loop.epochs}  step {step}/{steps}  "
            f"{rate:,.0f} samples/s  about {log.duration(left / rate)} left"
        )

    def _finish_epoch(self, record: EpochRecord, result: Evaluation) -> None:
        """Note an epoch's results."""
        progress = self.progress
        improved = self.best is None or result.correct > self.best.correct
        if improved:
            progress.best_epoch, self.best = record.epoch, result
        progress.history.append(record)
        progress.epoch, progress.position = record.epoch, 0
        progress.loss_sum, progress.correct = 0.0, 0
        progress.seconds += record.seconds
        if self.main:
            logger.info(
                "epoch %d/%d  train loss %.4f, %s  valid loss %.4f, %s%s  %s, %s samples/s",
                record.epoch,
                self.config.loop.epochs,
                record.train_loss,
                log.percent(record.train_correct, record.train_total),
                record.valid_loss,
                log.percent(record.valid_correct, record.valid_total),
                " (best)" if improved else "",
                log.duration(record.seconds),
                f"{record.samples_per_second:,.0f}",
            )

    def _log_results(self) -> None:
        """Figures and the best model, by rank 0; the other workers are done."""
        self.worker.wait_for_uploads()
        if not self.main:
            return
        assert self.best is not None
        model = self._best_model()
        reporting.log_figures(self.tracker, self.loader, self.progress, self.best)
        example, _ = self.loader.pictures("valid", range(min(4, self.info.valid_size)))
        self.tracker.log_model(model, self.identity, self.info, example, step=self.progress.best_epoch)
        self.visualizer.finish(
            model,
            self.loader,
            self.worker.device,
            self.arithmetic,
            self.best,
            self.progress.best_epoch,
            channels_last=self.config.loop.channels_last,
        )

    def _best_model(self) -> nn.Module:
        """The whole model of the best epoch, as its checkpoint has it."""
        with self.worker.open_best_checkpoint() as folder:
            saved = ckpt.load(folder, map_location=self.worker.device) if folder is not None else None
        if saved is not None and self.mode.slices:
            model = self._build_model()  # no worker has all of a split one
            model.load_state_dict(ckpt.trained_tensors(saved))
            return model
        if saved is not None:
            average = saved.state["ema"] if self.ema is not None else None
            target = self.ema if self.ema is not None and average else self.model
            target.load_state_dict(average or saved.state["model"])
        return self._validated_model()

    def _summary(self) -> Summary:
        history, best = self.progress.history, self.progress.best
        assert best is not None
        return Summary(
            data=str(self.info),
            model=str(self.identity),
            workers=self.worker.world_size,
            hardware=describe(self.worker.device),
            epochs=self.progress.epoch,
            best_epoch=best.epoch,
            best_correct=best.valid_correct,
            valid_total=best.valid_total,
            samples_per_second=sum(r.samples_per_second for r in history) / len(history),
            train_seconds=self.progress.seconds,
            first_step_at=self.first_step_at,
            visualized=self.visualizer.enabled,
            slow_requests=sum((record.slow_requests for record in history), slow_requests.meter.take()),
            ridge=self.progress.ridge,
        )
