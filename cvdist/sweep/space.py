"""The search space of a sweep: ranges of settings as users write them, and the sampled points."""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cvdist import config as configs
from cvdist.config import TrainConfig
from cvdist.errors import UserError, did_you_mean
from cvdist.seeding import derive_seed

Settings = dict[str, Any]
"""A trial's values of the searched settings, by the names of their flags."""

_DIGITS = 3  # significant digits of sampled numbers, so that people can type them again
_DRAWS_PER_TRIAL = 64  # how many points are drawn, at most, per point that differs from all others
# Settings that can differ between trials which share one feature cache and one order of the data.
_SEARCHABLE = (
    *("head", "hidden_size", "dropout", "views", "batch_size"),
    *("optimizer", "lr", "momentum", "nesterov", "weight_decay", "lr_scheduler", "lr_warmup_epochs"),
    *("label_smoothing", "clip_grad_norm", "model_ema_decay"),
)


@dataclass(frozen=True)
class Dimension:
    """One searched setting and its range: one of `choices`, or from `low` to `high`.

    Attributes:
        name: Name of the field.
        kind: Type of its values.
        choices: Values to choose from. Empty for a range of numbers.
        low: Lower end of the range.
        high: Upper end of the range.
        logarithmic: Whether the range is sampled uniformly in the logarithm.
    """

    name: str
    kind: type
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    logarithmic: bool = False

    @property
    def flag(self) -> str:
        """The flag of the setting without leading hyphens."""
        return self.name.replace("_", "-")

    def value_at(self, fraction: float) -> Any:
        """Return the value at a fraction of the range, in [0, 1)."""
        if self.choices:
            return self.choices[min(int(fraction * len(self.choices)), len(self.choices) - 1)]
        if self.kind is int and not self.logarithmic:
            return int(self.low) + min(int(fraction * (self.high - self.low + 1)), int(self.high - self.low))
        if self.logarithmic:
            value = math.exp(math.log(self.low) + fraction * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + fraction * (self.high - self.low)
        value = min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)
        return round(value) if self.kind is int else value

    def fraction_of(self, value: Any) -> float:
        """Return the fraction of the range at which `value` lies, the inverse of `value_at`.

        A choice lies in the middle of the interval of fractions that give it.
        """
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices)
        if self.low == self.high:
            return 0.5
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return float((value - self.low) / (self.high - self.low))

    def __str__(self) -> str:
        """Write the setting and its range in the syntax of `--search`."""
        if self.choices:
            return f"{self.flag}={','.join(map(format_value, self.choices))}"
        end = ":log" if self.logarithmic else ""
        return f"{self.flag}={format_value(self.low)}:{format_value(self.high)}{end}"


def parse_search(words: Sequence[str], config: TrainConfig) -> tuple[Dimension, ...]:
    """Parse the values of `--search`.

    Args:
        words: The values. Empty for the default search space around the values of `config`.
        config: The settings of the job.

    Raises:
        UserError: If a value is not valid. The message names it and says what is expected.
    """
    space = tuple(_parse_one(word) for word in words) if words else _default_dimensions(config)
    names = [dimension.name for dimension in space]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--search names {name.replace('_', '-')} twice: give each setting one range")
    for dimension in space:
        for value in dimension.choices or (dimension.low, dimension.high):
            require_fit(config, {dimension.name: dimension.kind(value)}, f"--search {dimension}")
    return space


def sample_points(space: Sequence[Dimension], seed: int, count: int) -> list[Settings]:
    """Sample `count` different points, or fewer if the space has no more.

    The points are those of a scrambled Sobol' sequence (Sobol' 1967, "On the distribution of points in a cube
    and the approximate evaluation of integrals", scrambled after Owen). It covers the space more evenly than
    random search (Bergstra and Bengio 2012). A smaller `count` gives the first of the same points.
    """
    from torch.quasirandom import SobolEngine

    engine = SobolEngine(len(space), scramble=True, seed=derive_seed("sweep", seed))
    found: list[Settings] = []
    for _ in range(_DRAWS_PER_TRIAL * count):
        fractions = engine.draw(1)[0].tolist()
        point = {one.name: one.value_at(fraction) for one, fraction in zip(space, fractions, strict=True)}
        if point.get("head") == "linear":
            # A linear head has neither, so points that differ only in these are the same.
            point = {name: value for name, value in point.items() if name not in ("hidden_size", "dropout")}
        if point not in found:
            found.append(point)
        if len(found) == count:
            break
    return found


def apply_settings(config: TrainConfig, settings: Settings) -> TrainConfig:
    """Return `config` with a trial's settings.

    Raises:
        UserError: If no run is possible with these settings.
    """
    changed = configs.replace(config, **settings)
    configs.check(changed)
    return changed


def require_fit(config: TrainConfig, settings: Settings, where: str) -> None:
    """Refuse a trial's settings with which no run is possible.

    Raises:
        UserError: with a message that begins with `where`.
    """
    try:
        apply_settings(config, settings)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def format_settings(settings: Settings) -> str:
    """Format settings for people: `lr=0.0002 dropout=0.5`."""
    return " ".join(f"{name.replace('_', '-')}={format_value(value)}" for name, value in settings.items())


def format_flags(settings: Settings) -> str:
    """Format settings as flags of a command: `--lr 0.0002 --dropout 0.5`."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag} {format_value(value)}")
    return " ".join(words)


def format_value(value: Any) -> str:
    """Format a value as users write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _default_dimensions(config: TrainConfig) -> tuple[Dimension, ...]:
    """Return the search space of a sweep without `--search`, around the values of `config`."""
    lr, decay = config.optimizer.lr, config.optimizer.weight_decay or 1e-4
    words = [f"lr={lr / 10:g}:{lr * 10:g}:log", f"weight-decay={decay / 100:g}:{decay * 100:g}:log"]
    if config.model.has_weights and config.model.cut == "maps" and "head" in _fields():
        words.append("head=vgg,mlp,linear")
    words.append("dropout=0:0.8")
    return tuple(map(_parse_one, words))


def _parse_one(word: str) -> Dimension:
    flag, equals, range_ = word.partition("=")
    name = flag.strip().lstrip("-").replace("-", "_")
    fields = _fields()
    if not equals or not range_:
        raise UserError(
            f"--search {word}: it takes FLAG=RANGE, such as lr=1e-5:1e-2:log, dropout=0:0.7 or dropout=0.2,0.5"
        )
    if name not in fields:
        known = ", ".join(sorted(fields))
        hint = did_you_mean(name, fields, f"the settings that can be searched are {known}")
        raise UserError(f"--search {word}: {flag} can't be searched: {hint}".replace("_", "-"))
    kind, options = fields[name]
    if ":" not in range_:
        return Dimension(
            name, kind, choices=tuple(_value(word, one, kind, options) for one in range_.split(","))
        )
    parts = range_.split(":")
    if kind not in (int, float):
        raise UserError(f"--search {word}: {flag} takes choices, {flag}={','.join(options) or 'true,false'}")
    if len(parts) > 3 or (len(parts) == 3 and parts[2] != "log"):
        raise UserError(f"--search {word}: a range is FROM:TO, or FROM:TO:log")
    low, high = (_value(word, part, kind, ()) for part in parts[:2])
    logarithmic = len(parts) == 3
    if low > high:
        raise UserError(
            f"--search {word}: {format_value(low)} is above {format_value(high)}: name the lower end first"
        )
    if logarithmic and low <= 0:
        raise UserError(f"--search {word}: a logarithmic range begins above 0")
    return Dimension(name, kind, low=low, high=high, logarithmic=logarithmic)


def _value(word: str, part: str, kind: type, options: tuple[str, ...]) -> Any:
    part = part.strip()
    try:
        if kind is bool:
            return {"true": True, "false": False}[part.lower()]
        value = kind(part)
    except (ValueError, KeyError):
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise UserError(f"--search {word}: {part!r} is not {wanted}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--search {word}: {part!r} is not a finite number")
    if options and value not in options:
        raise UserError(f"--search {word}: {part!r} is not one of {', '.join(options)}")
    return value


def _fields() -> dict[str, tuple[type, tuple[str, ...]]]:
    """Return the type and, for texts, the possible values of each setting that can be searched, by its flag."""
    found: dict[str, tuple[type, tuple[str, ...]]] = {}
    for one in configs.settings_of(TrainConfig):
        if one.flag in _SEARCHABLE:
            kind = configs.plain_type(one.hint)
            options = typing.get_args(kind)
            found[one.flag] = (str, options) if options else (kind, ())
    return found
