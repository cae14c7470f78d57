"""The cost model: against sums worked by hand, at its limits, and what `--parallel auto` makes of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvdist import config as configs
from cvdist import models, recipes
from cvdist.config import ParallelConfig
from cvdist.distributed.precision import choose_precision
from cvdist.models import InputSpec
from cvdist.parallel import cost, plan
from cvdist.parallel.cost import Machine, Work

FIRST, SECOND, LAST = 25088 * 4096 + 4096, 4096 * 4096 + 4096, 4096 * 2 + 2
VGG16 = Work(
    batch=64,
    flops=4.0 * 25088 * 4096 + 6 * 4096 * 4096 + 6 * 4096 * 2,  # the inputs need no gradient
    parameters=FIRST + SECOND + LAST,
    split_parameters=FIRST + SECOND - 4096,  # the second bias is whole
    columns=4096,
    early_parameters=SECOND + LAST,
)
GIGABIT = 125e6
MACHINE = Machine(matrix_rate=100e9, memory_rate=10e9, link_rate=GIGABIT, latency=1e-4)
WAYS = (cost.data_parallel, cost.split_head)

rates = st.floats(1e6, 1e16)
machines = st.builds(Machine, rates, rates, rates, st.floats(0, 1), rates)
works = st.builds(
    lambda batch, first, columns, early, **sizes: Work(
        batch=batch,
        flops=4.0 * first + 6 * columns * early,
        parameters=first + columns * early,
        split_parameters=first,
        columns=columns,
        early_parameters=columns * early,
        **sizes,
    ),
    batch=st.integers(1, 10_000),
    first=st.integers(1, 10**9),
    columns=st.integers(1, 10_000),
    early=st.integers(0, 10_000),
    gathered=st.sampled_from([0, 512, 25_088]),
    input_bytes=st.sampled_from([0.0, 50_176.0]),
)


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_bytes_of_vgg16_are_the_sums_by_hand(workers):
    ring = 2 * (workers - 1) / workers
    assert cost.data_parallel(VGG16, MACHINE, workers).sent == pytest.approx(ring * 478.216e6, rel=1e-5)
    assert cost.data_parallel(VGG16, MACHINE, workers, 2.0).sent == pytest.approx(ring * 239.108e6, rel=1e-5)
    assert cost.split_head(VGG16, MACHINE, workers).sent == pytest.approx(ring * 64 * 4096 * 4)


def test_without_a_cache_features_are_gathered_and_trained_convolutions_averaged():
    frozen = replace(VGG16, gathered=25088)
    summed, gathered = 64 * 4096 * 4, 3 / 4 * 64 * 25088 * 4
    assert cost.split_head(frozen, MACHINE, 4).sent == pytest.approx(1.5 * summed + gathered)
    block = 7_079_424  # the three convolutions of VGG16's last block
    trained = replace(frozen, data_parameters=block, parameters=VGG16.parameters + block)
    features = 1.5 * 64 * 25088 * 4
    assert cost.split_head(trained, MACHINE, 4).sent == pytest.approx(
        1.5 * summed + gathered + features + 1.5 * 4 * block
    )


def test_seconds_are_computing_and_what_of_the_exchange_nothing_hides():
    alone = cost.data_parallel(VGG16, MACHINE, 1)
    # 64 x 512 MFLOP at 100 GFLOP/s, longer than 2 passes of 478 MB; then 5 passes at 10 GB/s.
    assert alone.seconds == pytest.approx(64 * 0.51175e9 / 100e9 + 5 * 0.0478216, rel=1e-3)
    two = cost.data_parallel(VGG16, MACHINE, 2)
    # The second layer's 67 MB take longer than the first one's gradient for 32 pictures, which hides the rest.
    hidden = 2 * FIRST / VGG16.flops * max(two.arithmetic, two.memory * 2 / 7)
    assert two.communication == pytest.approx(478.216e6 / GIGABIT - hidden + 1e-4, rel=1e-5)
    fast = cost.data_parallel(VGG16, replace(MACHINE, link_rate=1e12), 2)
    assert fast.communication == pytest.approx(4 * FIRST / 1e12 + 1e-4)  # all that comes early is hidden
    starved = cost.split_head(replace(VGG16, input_bytes=50_176), replace(MACHINE, input_rate=1e6), 2)
    assert starved.seconds == pytest.approx(64 * 50_176 / 1e6)


@given(works, machines)
def test_one_worker_sends_nothing_and_waits_for_nobody(work, machine):
    data, head = (way(work, machine, 1) for way in WAYS)
    assert data == head
    assert (data.sent, data.communication) == (0, 0)


@given(works, machines, st.integers(1, 1024), st.integers(1, 1024))
def test_more_workers_compute_less_each_and_send_more(work, machine, some, others):
    few, many = sorted((some, others))
    for way in WAYS:
        at_few, at_many = way(work, machine, few), way(work, machine, many)
        assert at_many.computing <= at_few.computing * (1 + 1e-9)
        assert at_many.sent >= at_few.sent * (1 - 1e-9)
        assert at_many.communication >= 0
    assert cost.parameters_per_worker(work, many) <= cost.parameters_per_worker(work, few)


@given(works, machines, st.integers(1, 1024), st.floats(1, 1000))
def test_a_faster_machine_never_takes_longer(work, machine, workers, factor):
    for name in ("matrix_rate", "memory_rate", "link_rate", "input_rate"):
        faster = replace(machine, **{name: getattr(machine, name) * factor})
        for way in WAYS:
            before, after = way(work, machine, workers).seconds, way(work, faster, workers).seconds
            assert after <= before * (1 + 1e-9)


@given(works, machines, st.integers(1, 1024))
def test_no_step_is_shorter_than_its_floor(work, machine, workers):
    for split, way in zip((False, True), WAYS, strict=True):
        least = cost.min_step_seconds(work, machine, workers, split=split)
        assert way(work, machine, workers).seconds >= least * (1 - 1e-9)


@pytest.mark.parametrize(("head", "chosen"), [("vgg", "head"), ("linear", "data")])
def test_auto_chooses_over_a_gigabit(head, chosen):
    config = configs.replace(recipes.find("dogs-cats-vgg16-features"), head=head, precision="float32")
    modules = models.frozen_and_trained(models.skeleton(config.model, 2).to("meta"))
    loader = SimpleNamespace(features=True, info=InputSpec(3, 224, 224))
    precision = choose_precision("float32", torch.device("cpu"))
    work, _ = plan.step_work(config.loop.batch_size, modules, loader, precision, 2)
    name, reason = plan.choose_mode(config.parallel, work, 2, lambda: MACHINE)
    note = plan.describe(name, reason, config.parallel, work, MACHINE, 2)
    assert name == chosen
    assert note.startswith(f"{chosen}: ")
    if head == "vgg":
        assert work == replace(VGG16, flops=work.flops)
        assert work.flops == pytest.approx(VGG16.flops)
        assert "478 MB" in note and "1.05 MB" in note


def test_what_the_user_or_the_checkpoint_says_needs_no_measurement():
    def measured():
        raise AssertionError("nothing is to be measured")

    def chosen(workers=2, work=VGG16, recorded="", **settings):
        return plan.choose_mode(ParallelConfig(**settings), work, workers, measured, recorded)

    assert chosen(workers=1, mode="head")[0] == "data"
    assert chosen(mode="head") == ("head", "as set by --parallel")
    assert chosen(mode="data", recorded="head")[0] == "data"
    assert chosen(recorded="head")[0] == "head"
    assert chosen(work=replace(VGG16, split_parameters=0), recorded="head")[0] == "data"
