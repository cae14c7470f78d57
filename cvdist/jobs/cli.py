"""Command lines: a recipe's name, flags that override its fields, and errors of one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import io
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cvdist import config as configs
from cvdist import log, recipes
from cvdist.config import (
    GROUPS,
    EvaluateConfig,
    PredictConfig,
    ReportConfig,
    SavedModelConfig,
    SweepConfig,
    SweepJobConfig,
    TrainConfig,
)
from cvdist.errors import EXIT_USER_ERROR, UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_GENERAL = {
    "--help": "this text; after a recipe's name, all its settings",
    "--show-config": "print the configuration as JSON and stop",
    "--debug": "more log, and a traceback with every error",
}


_LOOKS = {
    "--check": "URI: read a whole cache and compare it with what was written",
    "--describe": "URI: print what a cache holds",
    "--prune": "URI: delete what a cache no longer refers to, when nothing is being computed there",
}


@dataclass(frozen=True)
class CacheCommand:
    """A feature cache to be looked at. how: `check`, `describe` or `prune`."""

    how: str
    uri: str


def parse_train(arguments: Sequence[str], program: str = "train.py") -> TrainConfig | None:
    """Configuration from `RECIPE [--field value ...]`; None if only help or the configuration was asked for.

    Raises:
        UserError: for an unknown recipe or flag (with the nearest names), or a value of the wrong type.
    """
    return _parse(program, arguments, _overview(program, {}))


def parse_preprocess(arguments: Sequence[str]) -> TrainConfig | CacheCommand | None:
    """The same for `RECIPE --data PICTURES --features URI ...`, or `--check URI` and the like.

    Raises:
        UserError: as `parse_train`.
    """
    words = [word for word in arguments if word != "--debug"]
    flag, _, value = words[0].partition("=") if words else ("", "", "")
    if flag in _LOOKS:
        rest = [value] if value else words[1:]
        if len(rest) != 1 or rest[0].startswith("-"):
            raise UserError(f"{flag} takes one folder or URI, and no other flags")
        return CacheCommand(flag.removeprefix("--"), rest[0])
    config = _parse("preprocess.py", arguments, _overview("preprocess.py", _LOOKS))
    if config is not None and not config.features.features:
        raise UserError("--features is needed: the folder or URI that the features are written to")
    return config


def parse_sweep(arguments: Sequence[str]) -> SweepJobConfig | None:
    """The same for `RECIPE [--trials N] [--search FLAG=RANGE ...] [--field value ...]`.

    Raises:
        UserError: as `parse_train`.
    """
    example = "--trials 20 --search lr=1e-5:1e-2:log dropout=0.2,0.5 --name my-sweep"
    parsed = _parse_with({"sweep": SweepConfig}, "sweep.py", arguments, _overview("sweep.py", {}, example))
    return None if parsed is None else SweepJobConfig(parsed[0], parsed[1]["sweep"])


def _parse(program: str, arguments: Sequence[str], overview: str) -> TrainConfig | None:
    parsed = _parse_with({}, program, arguments, overview)
    return None if parsed is None else parsed[0]


def _parse_with(
    more: dict[str, type], program: str, arguments: Sequence[str], overview: str
) -> tuple[TrainConfig, dict[str, Any]] | None:
    """With `more` groups of flags than a training has: an instance of each comes by the same name."""
    words = [word for word in arguments if word != "--debug"]
    show = "--show-config" in words
    words = _with_values([word for word in words if word != "--show-config"])
    if not words or words[0] in ("-h", "--help"):
        print(overview)
        return None
    if words[0].startswith("-"):
        raise UserError(f"the first argument is a recipe, not {words[0]}: one of {', '.join(recipes.names())}")
    config = recipes.find(words[0])
    _require_known(words[1:], (*GROUPS.values(), *more.values()))
    config, rest = _override(program, config, words, more)
    if show:
        shown = {name: dataclasses.asdict(group) for name, group in rest.items()}
        print(json.dumps({**configs.to_dict(config), **shown}, indent=2))
        return None
    return config, rest


def _with_values(words: Sequence[str]) -> list[str]:
    """`--compile`, once a switch, alone and with `--no-`, as its values."""
    found: list[str] = []
    for word, following in pairwise([*words, "--"]):
        if word == "--no-compile":
            found += ["--compile", "none"]
        else:
            found += [word, "default"] if word == "--compile" and following.startswith("-") else [word]
    return found


Settings = TypeVar("Settings", bound="DataclassInstance")


def parse_model_job(
    program: str, arguments: Sequence[str], settings: type[Settings], about: str
) -> Settings | None:
    """Settings from `MODEL [--field value ...]`; None if only the configuration was asked for.

    settings: a dataclass of groups, of which `saved` is a `SavedModelConfig`: its `source` is the first
    argument, every other field of all groups a flag, so field names are unique. about: for `--help`.

    Raises:
        UserError: for an unknown flag (with the nearest names), or a value of the wrong type.
        SystemExit: after `--help`.
    """
    import tyro

    words = [word for word in arguments if word not in ("--debug", "--show-config")]
    asks_help = not words or bool({"-h", "--help"} & set(words))
    if not asks_help and words[0].startswith("-"):
        raise UserError(
            f"the first argument is MODEL, not {words[0]}: a run's name or id, models:/NAME/VERSION, a "
            "checkpoint, or a file of weights (--help)"
        )
    groups = _groups(settings)
    _require_known(words, tuple(groups.values()))
    # In place of the flag --source. A subclass, so that the help has the fields' descriptions.
    positional = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    source = ("source", positional, dataclasses.field(default=""))
    named = dataclasses.make_dataclass("SavedModel", [source], bases=(SavedModelConfig,), frozen=True)
    asked = {**groups, "saved": named}
    fields = [(name, cls, dataclasses.field(default_factory=cls)) for name, cls in asked.items()]
    shown = dataclasses.make_dataclass("Settings", fields, frozen=True)
    chosen = _ask_tyro(shown, program, about, ["--help"] if asks_help else words)
    values = {name: getattr(chosen, name) for name in groups}
    values["saved"] = SavedModelConfig(**dataclasses.asdict(chosen.saved))
    config = settings(**values)
    if "--show-config" in arguments:
        print(json.dumps(dataclasses.asdict(config), indent=2))
        return None
    return config


def parse_predict(arguments: Sequence[str]) -> PredictConfig | None:
    """The same for `MODEL --data PICTURES --output URI`.

    Raises:
        UserError: as `parse_model_job`.
    """
    return parse_model_job(
        "predict.py", arguments, PredictConfig, "Classify all pictures below a folder or URI, to parquet files."
    )


def parse_evaluate(arguments: Sequence[str]) -> EvaluateConfig | None:
    """The same for `MODEL [--data PICTURES] [--compare MODEL]`.

    Raises:
        UserError: as `parse_model_job`.
    """
    return parse_model_job(
        "evaluate.py", arguments, EvaluateConfig, "Measure a trained model, or two on the same pictures."
    )


def parse_report(arguments: Sequence[str]) -> tuple[str, ReportConfig]:
    """Which run is meant, and the rest, from `RUN [--output FILE] ...`.

    Raises:
        UserError: as `parse_train`.
        SystemExit: after `--help`.
    """
    words = [word for word in arguments if word != "--debug"]
    asks_help = not words or bool({"-h", "--help"} & set(words))
    if not asks_help and words[0].startswith("-"):
        raise UserError(f"the first argument is RUN, a run's name or id, not {words[0]}")
    _require_known(words, (ReportConfig,))
    about = "Make a run's report.html anew, from what MLflow has. RUN: the run's name or id."
    settings = _ask_tyro(ReportConfig, "report.py RUN", about, ["--help"] if asks_help else words[1:])
    return words[0], settings


def _groups(settings: type[Any]) -> dict[str, type]:
    """Each field's class, which is its default factory."""
    return {field.name: field.default_factory for field in dataclasses.fields(settings)}  # type: ignore[misc]


def main(job: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """Run a job and return its exit code; what the user can mend is one line on standard error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    log.setup(debug=debug)
    try:
        return job(words) or 0
    except UserError as error:
        logging.getLogger("cvdist").debug("", exc_info=True)
        if error.on_all_workers and os.environ.get("RANK", "0") != "0":
            return EXIT_USER_ERROR  # under torchrun: the first worker says it for all
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "")
        print(f"error: {type(error).__name__}: {first} (--debug shows where)", file=sys.stderr)
        return 1


def show(text: str) -> None:
    """Print what a finished job reports. A disk too full to keep its log does not make it a failed one."""
    for stream, words in ((sys.stdout, f"{text}\n"), (sys.stderr, "")):
        try:
            stream.write(words)
            stream.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # Python tries once more at its end, and would fail then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _override(
    program: str, config: TrainConfig, words: Sequence[str], more: dict[str, type]
) -> tuple[TrainConfig, dict[str, Any]]:
    # Without the field `recipe`, which the first argument has set.
    fields = [(name, cls, dataclasses.field(default_factory=cls)) for name, cls in more.items()]
    fields += [(name, cls, dataclasses.field(default=getattr(config, name))) for name, cls in GROUPS.items()]
    settings = dataclasses.make_dataclass("Settings", fields, frozen=True)
    about = f"Recipe {words[0]}: {recipes.names()[words[0]]}"
    chosen = _ask_tyro(settings, f"{program} {words[0]}", about, words[1:])
    changed = dataclasses.replace(config, **{name: getattr(chosen, name) for name in GROUPS})
    return changed, {name: getattr(chosen, name) for name in more}


def _ask_tyro(settings: type[Any], program: str, about: str, words: Sequence[str]) -> Any:
    """An instance of `settings`, whose fields are groups of flags.

    Raises:
        UserError: for what tyro does not take.
        SystemExit: after `--help`.
    """
    import tyro

    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(
                settings,
                prog=program,
                description=about,
                args=list(words),
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(output.getvalue())) from None


def _require_known(words: Sequence[str], groups: Sequence[type] = tuple(GROUPS.values())) -> None:
    fields = [field for cls in groups for field in dataclasses.fields(cls)]
    names = [field.name.replace("_", "-") for field in fields]
    switches = [name for name, field in zip(names, fields, strict=True) if field.type == "bool"]
    known = {f"--{name}" for name in names} | {f"--no-{name}" for name in switches} | set(_GENERAL)
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            near = difflib.get_close_matches(flag, sorted(known), n=2, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else "--help lists all"
            raise UserError(f"unknown flag {flag}: {hint}")


def _one_line(box: str) -> str:
    """Tyro's framed message without the frame and the help below it."""
    lines = [re.sub(r"^[│|]|[│|]$", "", line.strip()).strip() for line in box.splitlines()]
    lines = [line for line in lines if line and line[0] not in "╭╰─┌└"]
    text = []
    for line in lines:
        if line.startswith(("Argument helptext", "For full helptext", "Similar", "---")):
            break
        text.append(line)
    return " ".join(text) or "the arguments could not be read: --help shows them"


def _overview(program: str, looks: dict[str, str], example: str = "") -> str:
    options = {**looks, **_GENERAL}
    width = max(map(len, [*recipes.names(), *options]))
    usage = f"python jobs/{program} RECIPE [--field value ...]"
    lines = [f"usage: {usage}"]
    lines += [f"       python jobs/{program} {flag} URI" for flag in looks]
    lines += ["", "recipes:"]
    lines += [f"  {name:{width}}  {what}" for name, what in recipes.names().items()]
    lines += ["", "options:"]
    lines += [f"  {flag:{width}}  {what}" for flag, what in options.items()]
    if not example:
        example = (
            "--views 3 --features s3://bucket/features" if looks else "--lr 0.05 --workers 4 --name my-run"
        )
    lines += [
        "",
        f"Every setting of a recipe is a flag: --batch-size 32 {example}.",
        f"python jobs/{program} RECIPE --help lists them with their values.",
    ]
    return "\n".join(lines)
