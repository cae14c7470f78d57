"""Figures: what they say and that all of it can be read, not how each pixel looks."""

import io
import math
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex, to_rgb

import cvdist
from cvdist.figures import style
from cvdist.figures.confusion import confusion_matrix, most_confused
from cvdist.figures.curves import accuracy_curves, loss_curves
from cvdist.figures.penalties import penalty_curve
from cvdist.figures.pictures import picture_grid, wrong_grid
from cvdist.results import EpochRecord, HeldOut, LogisticResult
from tests.helpers.figures import (
    LONG_NAMES,
    assert_readable,
    assert_tidy,
    images,
    pixels,
    png,
    says,
    tiles_of,
    written,
)

DIGITS = [str(digit) for digit in range(10)]


def record(epoch, train_loss=0.5, valid_loss=0.6, train_correct=900, valid_correct=95):
    return EpochRecord(
        epoch=epoch,
        train_loss=train_loss,
        train_correct=train_correct,
        train_total=1000,
        valid_loss=valid_loss,
        valid_correct=valid_correct,
        valid_total=100,
        learning_rate=1e-3,
        seconds=10.0,
        samples_per_second=100.0,
    )


def long_history(epochs):
    """Loss falls and accuracy rises; the last epoch is the best."""
    return [record(e, 1 / e, 1.1 / e, 990 - 300 // e, 99 - 40 // e) for e in range(1, epochs + 1)]


def with_mistakes(classes, *mistakes, right=1000):
    """A matrix with `right` samples of each class right, and (true, predicted, count) wrong."""
    matrix = np.eye(classes, dtype=np.int64) * right
    for true, predicted, count in mistakes:
        matrix[true, predicted] = count
    return matrix


def line(figure, label):
    return next(line for line in figure.axes[0].get_lines() if line.get_label() == label)


def tick_labels(axis):
    axis.figure.canvas.draw()
    low, high = sorted(axis.get_view_interval())
    return [t.label1.get_text() for t in axis.get_major_ticks() if low <= t.get_loc() <= high]


# ------------------------------------------------------------------------------------------------- curves


def test_loss_lines_hold_the_history():
    history = [record(1, 0.9, 0.8), record(2, 0.5, 0.7), record(3, 0.3, 0.75)]
    figure = loss_curves(history)
    assert line(figure, "train").get_xdata().tolist() == [1, 2, 3]
    assert line(figure, "train").get_ydata().tolist() == [0.9, 0.5, 0.3]
    assert line(figure, "valid").get_ydata().tolist() == [0.8, 0.7, 0.75]
    assert "least validation loss 0.7 at epoch 2" in says(figure)
    assert line(figure, "best").get_xydata().tolist() == [[2, 0.7]]


def test_accuracy_lines_hold_the_history_and_the_best_epoch_its_counts():
    history = [record(1, train_correct=900, valid_correct=91), record(2, train_correct=950, valid_correct=97)]
    figure = accuracy_curves([*history, record(3, train_correct=990, valid_correct=96)])
    assert line(figure, "train").get_ydata().tolist() == [0.9, 0.95, 0.99]
    assert line(figure, "valid").get_ydata().tolist() == [0.91, 0.97, 0.96]
    assert "best validation 97.00% (97/100) at epoch 2" in says(figure)
    assert {"99.00%", "96.00%"} <= set(says(figure))  # where the lines end


def test_of_equal_epochs_the_first_is_marked():
    history = [record(epoch, valid_loss=0.5, valid_correct=90) for epoch in (1, 2, 3)]
    assert line(loss_curves(history), "best").get_xdata().tolist() == [1]
    assert line(accuracy_curves(history), "best").get_xdata().tolist() == [1]


def test_losses_that_are_no_numbers_leave_gaps():
    losses = [0.9, math.nan, 0.5, math.inf]
    figure = loss_curves([record(epoch, valid_loss=loss) for epoch, loss in enumerate(losses, start=1)])
    drawn = line(figure, "valid").get_ydata().tolist()
    assert drawn[::2] == [0.9, 0.5] and math.isnan(drawn[1]) and math.isnan(drawn[3])
    assert "least validation loss 0.5 at epoch 3" in says(figure)
    assert_readable(figure)


def test_a_run_without_a_finite_loss_says_so():
    figure = loss_curves([record(epoch, math.nan, math.nan) for epoch in (1, 2)])
    assert "no finite loss" in says(figure)
    assert not any("least" in text for text in says(figure))


@pytest.mark.parametrize("draw", [loss_curves, accuracy_curves])
@pytest.mark.parametrize("epochs", [1, 7, 300])
def test_curves_are_readable_and_epochs_are_whole(draw, epochs):
    figure = draw(long_history(epochs))
    assert_readable(figure)
    ticks = [int(label) for label in tick_labels(figure.axes[0].xaxis)]  # int("2.5") would raise
    assert 1 <= len(ticks) <= 13
    assert all(1 <= epoch <= epochs for epoch in ticks)


@pytest.mark.parametrize("draw", [loss_curves, accuracy_curves])
@pytest.mark.parametrize("best", [1, 12])
def test_no_text_lies_on_the_lines(draw, best):
    history = [record(e, 0.5, 0.4 if e == best else 0.6, 950, 99 if e == best else 95) for e in range(1, 13)]
    figure = draw(history)
    inside = figure.axes[0].get_window_extent()
    for text in written(figure):
        box = text.get_window_extent()
        assert box.x1 <= inside.x0 or box.x0 >= inside.x1 or box.y1 <= inside.y0 or box.y0 >= inside.y1


def test_loss_axis_is_logarithmic_only_for_losses_far_apart():
    assert loss_curves([record(1, 2.0, 2.0), record(2, 0.02, 0.03)]).axes[0].get_yscale() == "log"
    assert loss_curves([record(1, 2.0, 2.0), record(2, 0.2, 0.3)]).axes[0].get_yscale() == "linear"
    assert loss_curves([record(1, 2.0, 2.0), record(2, 0.0, 0.0)]).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("decades", [1.7, 4, 20])
def test_logarithmic_axis_has_labels_that_are_numbers(decades):
    figure = loss_curves([record(1, 2.0, 2.0), record(2, 2 * 10**-decades, 1.0)])
    labels = tick_labels(figure.axes[0].yaxis)
    assert 2 <= len(labels) <= 12
    low, high = figure.axes[0].get_ylim()
    assert all(low <= float(label) <= high for label in labels)
    assert_readable(figure)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 100)), min_size=1, max_size=5))
@settings(max_examples=20)
def test_accuracy_axis_holds_the_values_and_little_else(counts):
    figure = accuracy_curves([record(e, 0, 0, t, v) for e, (t, v) in enumerate(counts, start=1)])
    low, high = figure.axes[0].get_ylim()
    values = [value for train, valid in counts for value in (train / 1000, valid / 100)]
    assert 0 <= low <= min(values) <= max(values) <= high <= 1
    assert 0 < high - low <= max(0.005, 1.12 * (max(values) - min(values))) + 1e-9


def test_accuracy_axis_is_in_percent():
    figure = accuracy_curves([record(1, 0, 0, 970, 98), record(2, 0, 0, 980, 99)])
    assert tick_labels(figure.axes[0].yaxis) == ["97%", "97.5%", "98%", "98.5%", "99%"]


@pytest.mark.parametrize("draw", [loss_curves, accuracy_curves])
def test_a_history_without_epochs_is_refused(draw):
    with pytest.raises(ValueError, match="has no epochs"):
        draw([])


# ---------------------------------------------------------------------------------------- confusion matrix


def test_cells_hold_counts_and_the_diagonal_recall():
    figure = confusion_matrix(torch.tensor([[188, 12], [0, 150]]), ["cat", "dog"])
    cells = {(text.get_position(), text.get_text()) for text in figure.axes[0].texts}
    # Positions are (column, row): 12 cats were taken for dogs. The cell without a sample is empty.
    assert cells == {((0, 0), "188"), ((0, 0), "94.0%"), ((1, 0), "12"), ((1, 1), "150"), ((1, 1), "100.0%")}
    assert "Confusion matrix: 338/350 (96.57%) correct" in says(figure)
    assert tick_labels(figure.axes[0].xaxis) == tick_labels(figure.axes[0].yaxis) == ["cat", "dog"]


def test_a_class_never_right_and_one_without_samples_are_told_apart():
    figure = confusion_matrix(np.array([[0, 5], [0, 0]]), ["cat", "dog"])
    cells = sorted((text.get_position(), text.get_text()) for text in figure.axes[0].texts)
    assert cells == [((0, 0), "0"), ((0, 0), "0.0%"), ((1, 0), "5"), ((1, 1), "0"), ((1, 1), "–")]


@pytest.mark.parametrize("rate", [0.001, 0.3])
def test_counts_stand_out_from_their_cells(rate):
    mistakes = [(0, column, round(1000 * rate * column / 9)) for column in range(1, 10)]
    figure = confusion_matrix(with_mistakes(10, *mistakes), DIGITS)
    picture = pixels(figure)
    for text in figure.axes[0].texts:
        if text.get_text() in ("0", "100.0%"):
            continue
        column, row = text.get_position()
        x, y = figure.axes[0].transData.transform((column - 0.45, row - 0.45))  # in the cell's corner
        paper = picture[len(picture) - int(y), int(x)]
        assert contrast(to_rgb(text.get_color()), paper) > 3.9, text.get_text()


def test_one_mistake_in_ten_thousand_is_colored_and_what_is_right_is_not():
    figure = confusion_matrix(with_mistakes(10, (3, 5, 1)), DIGITS)
    picture = pixels(figure)

    def cell(row, column):
        x, y = figure.axes[0].transData.transform((column - 0.45, row - 0.45))
        return picture[len(picture) - int(y), int(x)]

    assert np.ptp(cell(3, 5)) > 0.5
    assert np.ptp(cell(3, 3)) == 0
    assert cell(5, 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize(("names", "size"), [*((LONG_NAMES, size) for size in (1, 2, 20, 31)), (DIGITS, 30)])
def test_confusion_matrix_is_readable(size, names):
    matrix = with_mistakes(size, *[(0, n, 12345) for n in range(1, size)], right=54321)
    figure = confusion_matrix(matrix, [names[n % len(names)] for n in range(size)])
    assert_readable(figure)


def test_counts_fit_into_their_cells():
    figure = confusion_matrix(with_mistakes(20, (3, 5, 88888), right=88888), LONG_NAMES * 6 + DIGITS[:2])
    figure.canvas.draw()
    (left, _), (right, _) = figure.axes[0].transData.transform([(0, 0), (1, 0)])
    widest = max(text.get_window_extent().width for text in figure.axes[0].texts)
    assert 0.7 < widest / (right - left) < 0.95


def test_names_are_not_formulas():
    figure = confusion_matrix(with_mistakes(2), ["$x_1$", "50% $ off"])
    assert tick_labels(figure.axes[0].xaxis) == ["$x_1$", "50% $ off"]
    assert not any(label.get_parse_math() for label in figure.axes[0].get_xticklabels())


def test_of_a_thousand_classes_the_one_mistake_is_seen_and_named():
    started = time.process_time()
    figure = confusion_matrix(with_mistakes(1000, (17, 940, 2), right=48), [f"class {n}" for n in range(1000)])
    picture = pixels(figure)
    assert time.process_time() - started < 10
    x, y = figure.axes[0].transData.transform((940, 17))
    around = picture[len(picture) - int(y) - 4 : len(picture) - int(y) + 5, int(x) - 4 : int(x) + 5]
    assert np.ptp(around, axis=-1).max() > 0.5
    assert {"2", "class 17", "class 940"} <= set(says(figure))
    assert_readable(figure)
    assert "Confusion matrix: 48000/48002 (100.00%) correct" in says(figure)


def test_no_mistakes_among_many_classes():
    assert "no mistakes" in says(confusion_matrix(with_mistakes(40), [str(n) for n in range(40)]))


def test_most_confused_by_count_then_by_place():
    matrix = with_mistakes(4, (0, 1, 3), (2, 0, 7), (3, 1, 3))
    assert most_confused(matrix, 10) == [(7, 2, 0), (3, 0, 1), (3, 3, 1)]
    assert most_confused(matrix, 2) == [(7, 2, 0), (3, 0, 1)]


def test_the_matrix_may_be_a_tensor_or_an_array_and_stays_as_it_was(tmp_path):
    matrix = with_mistakes(3, (0, 1, 3))
    before = matrix.copy()
    of_array = png(confusion_matrix(matrix, DIGITS[:3]), tmp_path)
    assert of_array == png(confusion_matrix(torch.from_numpy(matrix), DIGITS[:3]), tmp_path)
    assert (matrix == before).all()


def test_a_matrix_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 3\) for 10 classes"):
        confusion_matrix(with_mistakes(3), DIGITS)


# ----------------------------------------------------------------------------------------------- pictures


def test_pictures_are_in_reading_order_over_their_titles():
    shown = images(5)
    figure = picture_grid(shown, ["a", "b", "c", "d", "e"], title="letters", columns=3)
    drawn = tiles_of(figure)
    for (_, picture), expected in zip(drawn, shown, strict=True):
        assert (picture == expected.permute(1, 2, 0).numpy()).all()
    places = [(-round(box.y1), round(box.x0)) for box, _ in drawn]
    assert places == sorted(places) and len({top for top, _ in places}) == 2
    boxes = {text.get_text(): text.get_window_extent() for text in written(figure)}
    for letter, (box, _) in zip("abcde", drawn, strict=True):
        assert boxes[letter].x0 == pytest.approx(box.x0, abs=2)
        assert box.y0 - 25 < boxes[letter].y0 < boxes[letter].y1 < box.y0
    assert boxes["letters"].y0 > max(box.y1 for box, _ in drawn)


def test_color_pictures_keep_their_channels():
    shown = images(1, channels=3, height=100, width=100)
    ((_, drawn),) = tiles_of(picture_grid(shown, ["cat"], title="cats"))
    assert (drawn == shown[0].permute(1, 2, 0).numpy()).all()


def test_grey_is_shown_from_0_to_255_whatever_the_picture_holds():
    dim = torch.full((1, 1, 28, 28), 51, dtype=torch.uint8)
    figure = picture_grid(dim, ["dim"], title="dim")
    ((box, _),) = tiles_of(figure)
    picture = pixels(figure)
    middle = picture[len(picture) - int((box.y0 + box.y1) / 2), int((box.x0 + box.x1) / 2)]
    assert middle == pytest.approx(0.2)


def test_digits_are_crisp_and_photographs_smooth():
    def colors(side):
        """The number of colors that are drawn of a picture in black and white."""
        checked = (images(1, 1, side, side) > 127).to(torch.uint8) * 255
        figure = picture_grid(checked, ["x"], title="x")
        ((box, _),) = tiles_of(figure)
        picture = pixels(figure)
        rows = slice(len(picture) - int(box.y1) + 3, len(picture) - int(box.y0) - 3)
        return len(np.unique(picture[rows, int(box.x0) + 3 : int(box.x1) - 3]))

    assert colors(28) == 2
    assert colors(224) > 20


@pytest.mark.parametrize("count", [0, 1, 16])
@pytest.mark.parametrize("shape", [(28, 28), (90, 224)])
def test_grids_are_readable_with_long_names(count, shape):
    names = [LONG_NAMES[n % len(LONG_NAMES)] for n in range(count)]
    title = "pictures of " + ", ".join(LONG_NAMES)
    assert_tidy(picture_grid(images(count, 3, *shape), names, title=title))
    assert_tidy(wrong_grid(images(count, 3, *shape), names, names[::-1], [0.99] * count, title=title))


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (5, 5, 1), (9, 5, 2), (32, 8, 4)])
def test_rows_are_of_even_length(count, columns, rows):
    figure = picture_grid(images(count), ["x"] * count, title="x")
    assert len({round(box.x0) for box, _ in tiles_of(figure)}) == columns
    assert len({round(box.y0) for box, _ in tiles_of(figure)}) == rows


def caption_lines(figure):
    """The captions' lines, the pieces of each joined by spaces, from the upper left to the lower right."""
    lines = {}
    for text in written(figure):
        box = text.get_window_extent()
        if text.get_size() < style.TITLE_SIZE:
            lines.setdefault(-round(box.y1 / 4), []).append((box.x0, text.get_text()))
    return [" ".join(text for _, text in sorted(lines[y])) for y in sorted(lines)]


def test_a_mistake_is_told_in_a_sentence():
    figure = wrong_grid(images(2), ["8", "1"], ["3", "7"], [0.9974, 0.9], title="wrong")
    assert caption_lines(figure) == ["8 read as 3, 99.7% 1 read as 7, 90.0%"]
    colors = {text.get_text(): to_hex(text.get_color()).upper() for text in written(figure)}
    assert colors["8"] == colors["1"] == style.GREEN
    assert colors["3,"] == colors["7,"] == style.VERMILLION


def test_sixteen_mistaken_digits_fit_one_line_each():
    sure = [0.99999] * 16
    figure = wrong_grid(images(16), ["8"] * 16, ["0"] * 16, sure, title="wrong")
    assert caption_lines(figure) == [" ".join(["8 read as 0, >99.9%"] * n) for n in (6, 6, 4)]


def test_a_long_sentence_gives_each_name_a_line():
    figure = wrong_grid(images(1), LONG_NAMES[:1], ["tiger cat"], [0.5], title="wrong")
    assert caption_lines(figure) == [LONG_NAMES[0], "read as (50.0%)", "tiger cat"]


def test_nothing_wrong_is_said_in_words():
    none = torch.empty(0, 1, 28, 28, dtype=torch.uint8)
    figure = wrong_grid(none, [], [], [], title="Most confidently wrong", total=10000)
    assert set(says(figure)) == {"Most confidently wrong", "no mistakes: all 10000/10000 right"}
    assert sorted(says(wrong_grid(none, [], [], [], title="wrong"))) == ["no mistakes", "wrong"]


@pytest.mark.parametrize("bad", [images(2).float(), images(2)[0], images(2, channels=2)])
def test_images_of_another_kind_are_refused(bad):
    with pytest.raises(ValueError, match="uint8"):
        picture_grid(bad, ["a", "b"], title="bad")


def test_another_number_of_images_than_of_titles_is_refused():
    with pytest.raises(ValueError, match="2 images for 3"):
        picture_grid(images(2), ["a", "b", "c"], title="bad")


# -------------------------------------------------------------------------------------------------- style


@given(st.text(max_size=40), st.floats(0.2, 4.0))
@settings(max_examples=30)
@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_elided_text_fits_and_is_a_beginning_of_the_whole(text, room):
    shown = style.elide(text, room, 10)
    whole = " ".join(text.split())
    assert style.text_width(shown, 10) <= room
    assert shown == whole or (shown.endswith("…") and whole.startswith(shown[:-1]))


def test_a_text_is_not_cut_without_need():
    name, cut = "German short-haired pointer", "German short-h…"
    assert style.elide(name, style.text_width(name, 10), 10) == name
    assert style.elide(name, style.text_width(cut, 10), 10) == cut


def draw_all():
    return [
        accuracy_curves(long_history(20)),
        confusion_matrix(with_mistakes(60, (3, 5, 7)), [str(n) for n in range(60)]),
        wrong_grid(images(6), LONG_NAMES * 2, LONG_NAMES[::-1] * 2, [0.9] * 6, title="wrong"),
    ]


def test_the_same_figures_are_the_same_files_from_any_thread(tmp_path):
    figures = draw_all()
    assert all(900 <= figure.get_size_inches()[0] * style.DPI <= 1200 for figure in figures)  # as previewed
    expected = [png(figure, tmp_path) for figure in figures]
    found = {}

    def draw(thread):
        found[thread] = [png(figure, tmp_path, f"{thread}.png") for figure in draw_all()]

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: expected, 1: expected}
    assert all(b"Software" not in file and b"tIME" not in file for file in expected)


def test_pyplot_is_never_imported(monkeypatch):
    """It keeps global state, which threads would share."""
    uses = re.compile(r"^\s*(import|from) .*pyplot|matplotlib\.pyplot", re.MULTILINE)
    assert not [path for path in Path(cvdist.__file__).parent.rglob("*.py") if uses.search(path.read_text())]
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # neither does matplotlib import it
    style.save_png(confusion_matrix(with_mistakes(2), ["a", "b"]), io.BytesIO())


def contrast(one, other):
    """Contrast ratio of two sRGB colors, as WCAG 2.2 defines it."""

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_the_chosen_penalty_is_named_with_its_count():
    counts = [(10.0**-power, 40 + power) for power in range(4)]
    path = [HeldOut(penalty=at, loss=0.5, correct=count, total=48, passes=9) for at, count in counts]
    figure = penalty_curve(LogisticResult(epoch=1, penalty=0.01, folds=5, path=path, seconds=1.0))
    assert_readable(figure)
    said = says(figure)
    assert "Logistic regression: penalty 0.01" in said
    assert "87.50% (42/48) of held-out training pictures" in said
    assert {"0.001", "0.01", "0.1", "1"} <= {*said}
