"""The figures of the documents are those of the model, and the model does what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import cost_model as model
from benchmarks.cost_model import H100, L4, extraction_rate, job_cost
from tests.helpers.jobs import ROOT
from tests.unit.parallel.test_cost import VGG16


@pytest.mark.parametrize(
    ("table", "machines", "document"),
    [
        *((table, H100, "scaling") for table in
          (model.steps_table, model.ends_table, model.shares_table, model.data_table)),
        (model.cost_table, L4, "kubernetes"),
    ],
)  # fmt: skip
def test_the_documented_tables_are_what_the_script_prints(table, machines, document):
    assert table(machines) in (ROOT / "docs" / f"{document}.md").read_text()


def test_a_ring_over_nodes_is_as_fast_as_the_slowest_link():
    a = replace(H100, nvlink_gb_s=450, link_share=1, latency_us=20, hop_us=10)
    inside, across = model.machine(a, 8, 400, 0), model.machine(a, 64, 400, 0)
    assert (inside.link_rate, across.link_rate) == (450e9, 50e9)
    assert across.latency == pytest.approx((20 + 2 * 3 * 10) * 1e-6)  # eight nodes: a tree of three steps
    assert model.resident(a, 700_000) and not model.resident(a, 900_000)  # 50 kB each, in 40 GB
    assert model.machine(a, 8, 400, 900_000).input_rate == 3e9
    assert model.work(64) == replace(VGG16, activation_bytes=2, input_bytes=50_176)


def test_extraction_is_bound_by_the_slower_of_gpu_and_cores():
    a = replace(
        L4, matrix_tflops=100, matrix_share=0.307, forward_gflop=30.7, cores_per_gpu=7, decoded_per_core=250
    )
    assert extraction_rate(a) == pytest.approx(1000)  # 30.7 TFLOP/s at 30.7 GFLOP a picture
    assert extraction_rate(replace(a, cores_per_gpu=2)) == pytest.approx(500)


def test_more_pictures_cost_more_and_a_tighter_deadline_takes_more_gpus():
    small, large = job_cost(L4, 1_000_000), job_cost(L4, 100_000_000)
    assert large.gpu_hours > 50 * small.gpu_hours
    hurried = job_cost(replace(L4, deadline_hours=1.0), 100_000_000)
    assert hurried.extract_gpus > large.extract_gpus and hurried.extract_hours - L4.start_minutes / 60 <= 1.0
    assert large.gpu_hours_without_cache > 3 * large.gpu_hours
