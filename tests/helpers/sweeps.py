"""Searches and made-up trials."""

from __future__ import annotations

from cvdist import recipes
from cvdist.sweep import space
from cvdist.sweep.record import Trial, TrialEpoch

BASE = recipes.find("digits-cnn")


def parse(*words, base=BASE):
    return space.parse_search(words, base)


def trial(number, state="finished", corrects=(), **point):
    epochs = [TrialEpoch(i, correct, 100, 1.0) for i, correct in enumerate(corrects, start=1)]
    return Trial(number, point, state, tuple(epochs))


def tried():
    """Twenty trials whose accuracy depends on the learning rate alone; two lost ones and two stopped ones."""
    search = parse("lr=1e-4:1e-1:log", "dropout=0:0.8", "optimizer=sgd,adamw")
    found = []
    for number, point in enumerate(space.sample_points(search, 0, 20), start=1):
        right = round(500 + 450 * search[0].fraction_of(point["lr"]))
        epochs = tuple(TrialEpoch(i, right + i, 1000, 0.5) for i in range(1, 3 if number in (4, 5) else 4))
        found.append(Trial(number, point, "stopped" if number in (4, 5) else "finished", epochs))
    found[2] = Trial(3, found[2].settings, "diverged", (), "the loss became nan")
    point = {name: value for name, value in found[6].settings.items() if name != "dropout"}
    found[6] = Trial(7, point, "finished", found[6].epochs)
    return search, found
