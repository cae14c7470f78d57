"""Validation results by hand, and independent of how the data were dealt."""

from __future__ import annotations

import torch
from torch import nn

from cvdist.data.dataset import Batch
from cvdist.distributed.precision import choose_precision
from cvdist.results import Mistake
from cvdist.training.validation import evaluate, most_confident

CPU = torch.device("cpu")
FLOAT = choose_precision("float32", CPU)


class Scores(nn.Module):
    """Returns its input as scores."""

    def forward(self, images):
        return images.flatten(1)


def batch(scores, labels, first=0):
    images = torch.tensor(scores)[:, :, None, None]
    rows = torch.arange(first, first + len(labels))
    return Batch(images, torch.tensor(labels), rows, len(labels))


def test_counts_and_mistakes_by_hand():
    # Probabilities 1/4 and 3/4, 1/2 and 1/2 (the first class wins), and nearly 0 and 1.
    data = [batch([[0.0, 1.0986123], [0.0, 0.0]], [0, 0]), batch([[-20.0, 20.0]], [0], first=2)]
    result = evaluate(Scores(), data, 2, CPU, FLOAT)
    assert (result.correct, result.total) == (1, 3)
    assert result.confusion.tolist() == [[1, 2], [0, 0]]
    assert [(m.index, m.true, m.predicted) for m in result.mistakes] == [(2, (0,), (1,)), (0, (0,), (1,))]
    assert abs(result.mistakes[1].confidence - 0.75) < 1e-6
    # -log(1/4), -log(1/2), and 40
    assert abs(result.loss - (1.3862944 + 0.6931472 + 40.0) / 3) < 1e-5


def test_batch_sizes_change_nothing():
    torch.manual_seed(0)
    scores, labels = torch.randn(101, 5).tolist(), torch.randint(0, 5, (101,)).tolist()
    whole = evaluate(Scores(), [batch(scores, labels)], 5, CPU, FLOAT)
    parts = [batch(scores[i : i + 7], labels[i : i + 7], i) for i in range(0, 101, 7)]
    cut = evaluate(Scores(), parts, 5, CPU, FLOAT)
    assert torch.equal(whole.confusion, cut.confusion)
    assert [m.index for m in whole.mistakes] == [m.index for m in cut.mistakes]
    assert abs(whole.loss - cut.loss) < 1e-6


def test_a_worker_without_samples_counts_nothing():
    result = evaluate(Scores(), [], 3, CPU, FLOAT)
    assert (result.correct, result.total, result.mistakes) == (0, 0, [])


def test_ties_are_broken_by_row():
    mistakes = [Mistake(index, (0,), (1,), 0.5) for index in (9, 3, 40, 1)]
    assert [m.index for m in most_confident(mistakes)] == [1, 3, 9, 40]


def test_dropout_is_off_and_the_mode_is_put_back():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9)).train()
    first = evaluate(model, [batch([[1.0, 2.0]] * 50, [1] * 50)], 2, CPU, FLOAT)
    assert first.correct == 50
    assert model.training
