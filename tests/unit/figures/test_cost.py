"""The figure of accuracy against cost."""

from __future__ import annotations

from itertools import combinations

from matplotlib.text import Annotation

from cvdist.figures.cost import NetworkCost, accuracy_by_cost, pareto_front


def network(name, correct, gflop, solved=True):
    return NetworkCost(name, correct, 400, (correct / 400 - 0.01, correct / 400 + 0.004), gflop, solved)


def test_the_front_has_what_is_more_accurate_than_all_that_costs_no_more():
    networks = [network("d", 390, 4), network("a", 380, 1), network("b", 380, 2), network("c", 396, 4)]
    assert [one.name for one in pareto_front(networks)] == ["a", "c"]
    assert [one.name for one in pareto_front(networks[:1])] == ["d"]


def test_every_name_is_inside_and_covers_no_other():
    names = ["mobilenet_v2", "resnet50", "US$ 1 and US$ 5", "regnet_y_16gf-IMAGENET1K_SWAG_LINEAR_V1"]
    networks = [network(name, 390 + i // 2, 4 + 0.1 * i, solved=i != 1) for i, name in enumerate(names)]
    figure = accuracy_by_cost([*networks, network("vgg16", 397, 15.5)], "To train: resnet50", "on 400 pictures")
    figure.canvas.draw()
    shown = list(figure.findobj(Annotation))
    assert sorted(text.get_text() for text in shown) == sorted([*names, "vgg16"])
    boxes = [text.get_window_extent() for text in shown]
    inside = figure.axes[0].get_window_extent()
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(inside.x0 - 2 < box.x0 and box.x1 < inside.x1 + 2 for box in boxes)
    words = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert words == ["logistic regression", "ridge classifier", "95% interval", "Pareto front"]
