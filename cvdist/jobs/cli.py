"""Command lines of all jobs: which settings each takes, and errors of one line."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib
import io
import json
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from cvdist import config as configs
from cvdist import log, proxy, recipes
from cvdist.config import Setting, TrainConfig
from cvdist.errors import EXIT_USER_ERROR, UserError, did_you_mean
from cvdist.jobs import quiet
from cvdist.jobs.temporary import use_temporary_folder
from cvdist.runtime.environment import choose_launcher

_GENERAL = {
    "--help": "this text; after a recipe's name, all its settings",
    "--show-config": "print the configuration as JSON and stop",
    "--verbose": "also show what Ray and MLflow say, which else goes to a file",
    "--debug": "more log, and a traceback with every error; includes --verbose",
}
_CACHE_COMMANDS = {
    "--check": "URI: read a whole cache and compare it with what was written",
    "--describe": "URI: print what a cache holds",
    "--prune": "URI: delete what a cache no longer refers to, when nothing is being computed there",
}


@dataclass(frozen=True)
class CacheCommand:
    """A feature cache to check, describe or prune: `how` is `check`, `describe` or `prune`."""

    how: str
    uri: str


@dataclass(frozen=True)
class Job:
    """How the command line of a job is read.

    Args:
        settings: class of the job's settings, a dataclass of groups of which every field is a flag.
        summary: one line for the list of jobs.
        subject: what the first argument is: a `RECIPE`, which gives all settings a value, or a value itself.
            Empty: there is none.
        subject_field: `group.field` that this value is kept in; empty for a recipe.
        subject_help: what the first argument may be, for an error.
        from_recipe: makes the job's settings from those of a recipe.
        example: flags for the help text.
        without: flags of the settings' class that have no use here.
    """

    settings: type[Any]
    summary: str
    subject: str = "RECIPE"
    subject_field: str = ""
    subject_help: str = f"one of {', '.join(recipes.names())}"
    from_recipe: Callable[[TrainConfig], Any] = lambda recipe: recipe
    example: str = "--lr 0.05 --num-workers 4 --name my-run"
    without: frozenset[str] = frozenset()

    def flags(self) -> list[Setting]:
        """Return the settings that may be named on the command line."""
        return [
            one
            for one in configs.settings_of(self.settings)
            if one.flag not in self.without and f"{one.group}.{one.field}" != self.subject_field
        ]


_MODEL = "a run's name or id, models:/NAME/VERSION, a checkpoint, or a file of weights (--help)"
JOBS = {
    "train": Job(TrainConfig, "Train an image classifier."),
    "preprocess": Job(
        configs.PreprocessConfig,
        "Compute what a model's frozen layers make of the pictures, once.",
        from_recipe=configs.PreprocessConfig.of,
        example="--views 3 --features s3://bucket/features",
    ),
    "probe": Job(
        configs.ProbeConfig,
        "Compare pretrained networks on your pictures, before one of them is trained.",
        subject="",
        without=frozenset({"dataset"}),
    ),
    "inspect": Job(
        configs.InspectConfig,
        "Find what is wrong with labeled pictures: copies, leaks, wrong labels, odd ones.",
        subject="",
        without=frozenset({"dataset", "views", "trainable_stages"}),
    ),
    "sweep": Job(
        configs.SweepJobConfig,
        "Try settings, and train the best.",
        from_recipe=configs.SweepJobConfig.of,
        example="--trials 20 --search lr=1e-5:1e-2:log dropout=0.2,0.5 --name my-sweep",
        without=frozenset({"runtime", "resume"}),
    ),
    "evaluate": Job(
        configs.EvaluateConfig,
        "Measure a trained model, or two on the same pictures.",
        subject="MODEL",
        subject_field="saved.source",
        subject_help=_MODEL,
    ),
    "predict": Job(
        configs.PredictConfig,
        "Classify all pictures below a folder or URI, to parquet files.",
        subject="MODEL",
        subject_field="saved.source",
        subject_help=_MODEL,
    ),
    "visualize": Job(
        configs.VisualizeJobConfig,
        "Figures of what a model has learned: the filters of its convolutions and, with pictures, its "
        "activations, the pictures that activate its channels most, and Grad-CAM.",
        subject="MODEL",
        subject_field="saved.source",
        subject_help=_MODEL,
    ),
    "export": Job(
        configs.ExportConfig,
        "Write a trained model for other programs: ONNX, PyTorch's pt2, or weights with a description.",
        subject="MODEL",
        subject_field="saved.source",
        subject_help=_MODEL,
    ),
    "report": Job(
        configs.ReportConfig,
        "Make a run's report.html again, from what MLflow has.",
        subject="RUN",
        subject_field="page.run",
        subject_help="a run's name or id",
    ),
    # `preflight` takes the flags of the training that it precedes, and checks their values.
    "preflight": Job(TrainConfig, "Check before a training whether all that it needs is there."),
    "replay": Job(
        configs.ReplayConfig,
        "Deliver to MLflow (MLFLOW_TRACKING_URI) what a job kept while the server was away.",
        subject="JOURNAL",
        subject_field="replay.journal",
        subject_help="a file or URI, as the job has named it",
    ),
}


def command(job: str) -> str:
    """Return the command that starts `job`, in the way in which this process was started."""
    return f"cvdist {job}" if Path(sys.argv[0]).stem == "cvdist" else f"python jobs/{job}.py"


def flags(group: Any, usual: Any, leave_out: Collection[str] = ()) -> str:
    """Return the flags, each after a space, that turn the settings `usual` into `group`.

    Args:
        group: The settings, a group of the class of `usual`.
        usual: The settings that a command has without flags.
        leave_out: Fields for which no flag is returned.
    """
    words = []
    for one in configs.fields_of(type(group)):
        value = getattr(group, one.field)
        if one.field in leave_out or value == getattr(usual, one.field):
            continue
        if one.is_switch:
            words += [configs.dashed(one.flag if value else f"no_{one.flag}")]
        else:
            words += [configs.dashed(one.flag), shlex.quote(log.redact(str(value)))]
    return "".join(f" {word}" for word in words)


# ------------------------------------------------------------------------------------------------- running


def run(words: Sequence[str] | None = None) -> int:
    """Run the console script `cvdist JOB ...`, and return the exit code."""
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, JOBS))
        print("usage: cvdist JOB ...\n\njobs:")
        print("\n".join(f"  {name:{width}}  {job.summary}" for name, job in JOBS.items()))
        print("\ncvdist JOB --help tells what a job takes.")
        return 0
    if words[0] == "--version":
        import cvdist

        print(cvdist.__version__)
        return 0
    if words[0] not in JOBS:
        hint = did_you_mean(words[0], JOBS, f"there are: {', '.join(JOBS)}")
        print(f"error: unknown job {words[0]!r}: {hint}", file=sys.stderr)
        return EXIT_USER_ERROR
    use_temporary_folder()
    return run_job(words[0], words[1:])


def run_job(name: str, words: Sequence[str] | None = None) -> int:
    """Read the job's command line, do the job, print its result, and return the exit code.

    Args:
        name: the job's name, a key of `JOBS`.
        words: its arguments; None: those of this process.
    """

    def act(arguments: Sequence[str]) -> int | None:
        settings = parse(name, arguments)
        if settings is None:
            return 0
        module = importlib.import_module(f"cvdist.jobs.{name}")
        if isinstance(settings, CacheCommand):
            show(module.look_at_cache(settings.how, settings.uri))
            return 0
        if _runs_on_ray(settings):
            quiet.expect_ray()
        result = getattr(module, name)(settings)
        quiet.disconnect()
        if result is None:
            return 0
        show(module.table(result))
        return module.exit_code(result) if hasattr(module, "exit_code") else 0

    # With words, the job is a part of a process that goes on, as do the servers that libraries have started.
    if words is None:
        use_temporary_folder()
    return main(act, words, name)


def _runs_on_ray(settings: Any) -> bool:
    """Return whether a job's work is done by Ray's processes, not by this one."""
    group = getattr(settings, "runtime", None)
    return group is not None and choose_launcher(group.launcher) == "ray"


def main(
    job: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None, name: str = "job"
) -> int:
    """Call `job` with its arguments, and return the exit code.

    An error that the user can correct is one line on stderr.

    Args:
        job: gets the arguments.
        arguments: None: those of this process.
        name: the job's name, for the file with the messages of libraries.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    messages: quiet.LibraryMessages | None = None
    try:
        verbose = debug or "--verbose" in words
        with quiet.console(name, verbose=verbose) as messages:
            log.setup(debug=debug)
            proxy.ask_directly()
            return job(words) or 0
    except UserError as error:
        logging.getLogger("cvdist").debug("", exc_info=True)
        if not error.told_by_another:
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
        elif messages is not None and (last := messages.last()):
            sys.stderr.writelines(["the last of what Ray and MLflow said:\n", *last])
        first = next(iter(str(error).strip().splitlines()), "")
        print(f"error: {type(error).__name__}: {first} (--debug shows where)", file=sys.stderr)
        return 1


def show(text: str) -> None:
    """Print what a finished job reports. If the disk is too full for the output, the job does not fail."""
    for stream, words in ((sys.stdout, f"{text}\n"), (sys.stderr, "")):
        try:
            stream.write(words)
            stream.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # Python tries once more at its end, and would fail then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ------------------------------------------------------------------------------------------------- parsing


def parse(name: str, arguments: Sequence[str]) -> Any:
    """Return the settings that a job's command line names; None if it asked for help or the settings only.

    Args:
        name: the job's name, a key of `JOBS`.
        arguments: `RECIPE [--flag value ...]`, or another subject in place of the recipe; for `preprocess` also
            `--check URI` and the like, which give a `CacheCommand`.

    Raises:
        UserError: for an unknown recipe or flag (with the nearest names or the job that has it), or a value of
            the wrong type.
        SystemExit: after `--help` with a subject.
    """
    words = _with_values([word for word in arguments if word not in ("--debug", "--verbose", "--show-config")])
    if name == "preprocess" and (found := _cache_command(words)) is not None:
        return found
    job, program = JOBS[name], _program(name)
    if job.subject == "RECIPE":
        if not words or words[0] in ("-h", "--help"):
            print(_overview(name))
            return None
    elif not words or {"-h", "--help"} & set(words):
        words = ["--help"]
    if job.subject and words[0].startswith("-") and words != ["--help"]:
        takes = "a recipe" if job.subject == "RECIPE" else job.subject
        raise UserError(f"the first argument is {takes}, not {words[0]}: {job.subject_help}")
    if job.subject == "RECIPE":
        recipe = words.pop(0)
        base, program = job.from_recipe(recipes.find(recipe)), f"{program} {recipe}"
        about = f"Recipe {recipe}: {recipes.names()[recipe]}"
    else:
        base, about = job.settings(), job.summary
    _require_known(name, words)
    config = _ask_tyro(job, base, program, about, words)
    if "--show-config" in arguments:
        print(json.dumps(configs.to_dict(config), indent=2))
        return None
    return config


def _cache_command(words: list[str]) -> CacheCommand | None:
    flag, _, value = words[0].partition("=") if words else ("", "", "")
    if flag not in _CACHE_COMMANDS:
        return None
    rest = [value] if value else words[1:]
    if len(rest) != 1 or rest[0].startswith("-"):
        raise UserError(f"{flag} takes one folder or URI, and no other flags")
    return CacheCommand(flag.removeprefix("--"), rest[0])


def _program(name: str) -> str:
    """Return the name of the program for tyro's usage line."""
    return f"{name}.py" if command(name).startswith("python") else command(name)


def _with_values(words: Sequence[str]) -> list[str]:
    """Replace `--no-compile`, and `--compile` without a value, by `--compile` with the value they stand for."""
    found: list[str] = []
    for word, following in pairwise([*words, "--"]):
        if word == "--no-compile":
            found += ["--compile", "none"]
        else:
            found += [word, "default"] if word == "--compile" and following.startswith("-") else [word]
    return found


def _ask_tyro(job: Job, base: Any, program: str, about: str, words: Sequence[str]) -> Any:
    """Return the job's settings `base` with the changes of `words`; for `--help`, raise SystemExit."""
    import tyro

    shows_help = not {"-h", "--help"}.isdisjoint(words)
    groups: dict[str, type[Any]] = {}
    for name, cls in configs.groups_of(job.settings).items():
        texts = _help_texts(cls) if shows_help else {}  # type: ignore[arg-type]
        groups[name] = _shown(job, name, getattr(base, name), texts)
    fields = [(name, cls, dataclasses.field(default=cls())) for name, cls in groups.items()]
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            chosen: Any = tyro.cli(
                dataclasses.make_dataclass("Settings", fields, frozen=True),
                prog=program,
                description=about,
                args=list(words),
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(output.getvalue())) from None
    changed = {name: type(getattr(base, name))(**vars(getattr(chosen, name))) for name in groups}
    return dataclasses.replace(base, **changed)


@functools.cache
def _help_texts(group: type[object]) -> dict[str, str]:
    """Return each field's docstring as one paragraph, where tyro would keep the line breaks of the source."""
    import docstring_parser

    described = [docstring_parser.parse_from_object(cls).params for cls in reversed(group.__mro__[:-1])]
    return {one.arg_name: " ".join((one.description or "").split()) for params in described for one in params}


def _shown(job: Job, name: str, group: Any, texts: Mapping[str, str]) -> type[Any]:
    """Make the class of a group that tyro shows: with its values, the job's flags, and their help texts."""
    import tyro

    fields = []
    for one in configs.fields_of(type(group), name):
        # Tyro shows those that it calls aliases first.
        shown, *aliases = [one.alias, configs.dashed(one.flag)] if one.alias else [one.flag]
        text = texts.get(one.field)
        marks: list[Any] = [tyro.conf.arg(name=shown.replace("_", "-"), aliases=aliases, help=text)]
        if f"{name}.{one.field}" == job.subject_field:
            marks = [tyro.conf.Positional, tyro.conf.arg(metavar=job.subject, help=text)]
        elif one.flag in job.without:
            marks = [tyro.conf.Suppress]
        kind = Annotated[(configs.plain_type(one.hint), *marks)]  # type: ignore[valid-type]
        fields.append((one.field, kind, dataclasses.field(default=getattr(group, one.field))))
    cls = type(group)
    documented = {"__doc__": cls.__doc__}
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), frozen=True, namespace=documented)


def _require_known(job: str, words: Sequence[str]) -> None:
    """Refuse flags that the job does not take, and name the jobs that have them or the nearest names."""
    known = {word for one in JOBS[job].flags() for word in one.words} | set(_GENERAL)
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if not flag.startswith("--") or flag in known:
            continue
        others = [name for name, other in JOBS.items() if any(flag in one.words for one in other.flags())]
        if others:
            raise UserError(f"{flag} is a setting of {_and(others)}, not of {job}: leave it out")
        raise UserError(f"unknown flag {flag}: {did_you_mean(flag, sorted(known), '--help lists all')}")


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _one_line(box: str) -> str:
    """Extract tyro's message, without its frame and the help below it."""
    lines = [re.sub(r"^[│|]|[│|]$", "", line.strip()).strip() for line in box.splitlines()]
    lines = [line for line in lines if line and line[0] not in "╭╰─┌└"]
    text = []
    for line in lines:
        if line.startswith(("Argument helptext", "For full helptext", "Similar", "---")):
            break
        text.append(line)
    return " ".join(text) or "the arguments could not be read: --help shows them"


def _overview(name: str) -> str:
    looks = _CACHE_COMMANDS if name == "preprocess" else {}
    options = {**looks, **_GENERAL}
    width = max(map(len, [*recipes.names(), *options]))
    lines = [f"usage: {command(name)} RECIPE [--field value ...]"]
    lines += [f"       {command(name)} {flag} URI" for flag in looks]
    lines += ["", "recipes:"]
    lines += [f"  {recipe:{width}}  {what}" for recipe, what in recipes.names().items()]
    lines += ["", "options:"]
    lines += [f"  {flag:{width}}  {what}" for flag, what in options.items()]
    first = "--image-size 224" if name == "preprocess" else "--batch-size 32"
    lines += [
        "",
        f"Every setting of a recipe is a flag: {first} {JOBS[name].example}.",
        f"{command(name)} RECIPE --help lists them with their values.",
    ]
    return "\n".join(lines)
