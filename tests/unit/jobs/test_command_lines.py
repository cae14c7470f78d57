"""Which job takes which flag, and what it says to one of another job."""

from __future__ import annotations

import sys

import pytest

from cvdist import config as configs
from cvdist.jobs import cli
from tests.helpers.jobs import user_error

SUBJECT = {"RECIPE": ["digits-cnn"], "MODEL": ["a-run"], "RUN": ["a-run"], "JOURNAL": ["a-file"], "": []}


def refusal(job, *words):
    return user_error(cli.parse, job, [*SUBJECT[cli.JOBS[job].subject], *words])


@pytest.mark.parametrize(
    ("job", "flag", "message"),
    [
        ("preprocess", "--epochs", "--epochs is a setting of train, sweep and preflight, not of"),
        ("preprocess", "--num-workers", "--num-workers is a setting of train, sweep and preflight"),
        ("train", "--extractors", "--extractors is a setting of preprocess, probe and inspect, not of train"),
        ("train", "--weights-dir", "--weights-dir is a setting of probe, not of train"),
        ("probe", "--lr", "--lr is a setting of train, sweep and preflight, not of probe"),
        ("train", "--trials", "--trials is a setting of sweep, not of train"),
        ("sweep", "--runtime", "--runtime is a setting of train, preprocess, probe, inspect, predict and"),
        ("evaluate", "--predictors", "--predictors is a setting of predict, not of evaluate"),
        ("report", "--lr", "--lr is a setting of train, sweep and preflight, not of report"),
    ],
)  # fmt: skip
def test_a_flag_of_another_job_is_refused_with_the_job_that_has_it(job, flag, message):
    text = refusal(job, flag, "1")
    assert text.startswith(message) and "\n" not in text
    if "is a setting of" in text:
        assert text.endswith(f", not of {job}: leave it out")


@pytest.mark.parametrize("job", list(cli.JOBS))
def test_help_and_parser_have_the_same_flags(job, capsys):
    with pytest.raises(SystemExit):
        cli.parse(job, [*SUBJECT[cli.JOBS[job].subject], "--help"])
    shown = capsys.readouterr().out
    for setting in cli.JOBS[job].flags():
        for word in setting.words:
            assert f"{word}" in shown, word
    for flag in cli.JOBS[job].without:
        assert f"{configs.dashed(flag)} " not in shown


def test_texts_of_the_help_fill_their_lines_whatever_the_breaks_in_the_source(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        cli.parse("train", ["digits-cnn", "--help"])
    assert "Empty: each picture has one class." in capsys.readouterr().out


def test_preprocess_takes_what_an_extraction_depends_on_and_where_it_runs():
    flags = {setting.flag for setting in cli.JOBS["preprocess"].flags()}
    assert flags == {
        *("data", "data_root", "path_column", "label_column", "label_separator", "split_column"),
        *("image_size", "resize", "max_bad_fraction", "decode_workers"),
        *(setting.flag for setting in configs.fields_of(configs.AugmentationConfig)),
        *("features", "views", "features_dtype", "decoder", "shard_size", "extractors", "replace"),
        *(
            "model",
            "weights",
            "weights_preprocessing",
            "trainable_stages",
            "features_at",
            "precision",
            "channels_last",
        ),
        *("runtime", "device", "cpus_per_worker", "connect_timeout", "resource_timeout", "data_timeout"),
    }


def test_values_arrive_in_their_groups():
    config = cli.parse("train", ["digits-cnn", "--workers", "3", "--model", "x", "--no-async-checkpoints"])
    assert (config.runtime.num_workers, config.model.name) == (3, "x") and not config.checkpoint.asynchronous
    assert cli.parse("train", ["digits-cnn", "--num-workers", "2:3"]).runtime.worker_range == (2, 3)
    config = cli.parse(
        "preprocess", ["dogs-cats-vgg16-features", "--features-dtype", "bfloat16", "--data", "d"]
    )
    assert (config.features.dtype, config.data.uri, config.recipe) == (
        "bfloat16",
        "d",
        "dogs-cats-vgg16-features",
    )
    config = cli.parse("sweep", ["digits-cnn", "--trials", "3", "--search", "lr=1:2", "dropout=0,0.5"])
    assert config.sweep.search == ("lr=1:2", "dropout=0,0.5") and config.optimizer.momentum == 0.9
    config = cli.parse("report", ["a-run", "--output", "x.html", "--storage", "s"])
    assert (config.page.run, config.page.output, config.lookup.storage) == ("a-run", "x.html", "s")
    assert cli.parse("replay", ["journal.jsonl"]).replay.journal == "journal.jsonl"
    assert cli.parse("preprocess", ["--check", "s3://b/c"]) == cli.CacheCommand("check", "s3://b/c")


def test_the_console_script_lists_jobs_and_names_its_mistakes(capsys, monkeypatch):
    assert cli.run([]) == 0
    overview = capsys.readouterr().out
    assert all(f"  {job} " in overview for job in cli.JOBS)
    assert cli.run(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown job 'trian': did you mean train?\n"
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/cvdist", "train"])
    assert cli.command("train") == "cvdist train"
    monkeypatch.setattr(sys, "argv", ["jobs/sweep.py"])
    assert cli.command("train") == "python jobs/train.py"


def test_all_jobs_are_exported():
    import cvdist.jobs

    for job in cli.JOBS:
        assert getattr(cvdist.jobs, job).__name__ == job
        assert getattr(cvdist.jobs, f"{job.capitalize()}Result")
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        cvdist.jobs.trian  # noqa: B018
