"""The figures of docs/kubernetes.md are those of the model, and the model does what it says."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import cost_model
from benchmarks.cost_model import Assumptions, cost, extraction_rate, step_seconds
from tests.helpers.jobs import ROOT


def test_the_documented_table_is_what_the_script_prints():
    assert cost_model.table(Assumptions()) in (ROOT / "docs" / "kubernetes.md").read_text()


def test_extraction_is_bound_by_the_slower_of_gpu_and_cores():
    a = Assumptions(
        gpu_tflops=100, utilization=0.307, forward_gflop=30.7, cores_per_gpu=7, decoded_per_core=250
    )
    assert extraction_rate(a) == pytest.approx(1000)  # 30.7 TFLOP/s at 30.7 GFLOP a picture
    assert extraction_rate(dataclasses.replace(a, cores_per_gpu=2)) == pytest.approx(500)


def test_a_step_is_arithmetic_traffic_and_exchange():
    a = Assumptions(
        classifier_weights_m=100,
        gpu_tflops=60,
        gpu_memory_gb_s=240,
        utilization=1,
        batch_size=1000,
        network_gbit_s=8,
    )
    assert step_seconds(a) == pytest.approx(
        0.01 + 0.01
    )  # 6e11 operations at 60e12 a second; 2.4 GB at 240 GB/s
    assert step_seconds(a, 2) == pytest.approx(0.005 + 0.01 + 0.4)  # 400 MB of gradients through 1 GB/s


def test_more_pictures_cost_more_and_a_tighter_deadline_takes_more_gpus():
    a = Assumptions()
    small, large = cost(1_000_000, a), cost(100_000_000, a)
    assert large.features_gb == pytest.approx(100 * small.features_gb)
    assert large.gpu_hours > 50 * small.gpu_hours and large.compute_price == pytest.approx(
        large.gpu_hours * a.gpu_hour
    )
    hurried = cost(100_000_000, dataclasses.replace(a, deadline_hours=1.0))
    assert hurried.extract_gpus > large.extract_gpus and hurried.extract_hours - a.start_minutes / 60 <= 1.0
    assert large.gpu_hours_without_cache > 3 * large.gpu_hours
