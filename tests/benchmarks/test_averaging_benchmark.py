"""The benchmark of averaging, on tiny sizes: it runs, and no figure is missing."""

from __future__ import annotations

import json

import pytest

from benchmarks import averaging, averaging_gpu

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "averaging.json"
    averaging.main(["--quick", "--out", str(path)])
    return json.loads(path.read_text())


def test_every_form_of_the_arithmetic_has_a_rate(results):
    for at in results["arithmetic"]["by threads"].values():
        assert at["GB/s"].keys() == results["arithmetic"]["bytes an element"].keys()
        assert all(rate["median"] > 0 for rate in at["GB/s"].values())
        assert at["compensated / mark"]["median"] > 0


def test_the_compensated_form_has_the_least_error(results):
    for errors in results["error"]["by learning rate"].values():
        least = min(errors, key=lambda name: errors[name]["displacement_share"])
        assert "compensated" in least


@pytest.mark.skipif(
    averaging.torch.cuda.is_available(), reason="on a GPU an event is measured in one process"
)
def test_an_event_is_measured_beside_the_others_under_every_engine(results):
    for at in results["event"]["by ranks"].values():
        assert at["engines"].keys() == {"ddp", "zero2", "zero3"}
        for found in filter(lambda found: "skipped" not in found, at["engines"].values()):
            swaft, *others = found["averages"].values()
            assert swaft["collectives"] == 1
            assert swaft["total s"]["median"] > 0
            assert all("skipped" in other or other["total s"]["median"] > 0 for other in others)
            assert found["paired steps"]["averaged / bare"]["median"] > 0


def test_six_bytes_an_element_are_accounted_for(results):
    forms = results["memory"]["by precision"]
    assert forms["compensated"]["accounted bytes an element"] == 6
    assert forms["plain"]["accounted bytes an element"] == 4


def test_results_of_another_machine_are_not_mixed_in(results, tmp_path):
    path = tmp_path / "averaging.json"
    path.write_text(json.dumps(results | {"environment": {"processor": "another"}}))
    with pytest.raises(SystemExit, match="measure all sections again"):
        averaging.main(["--quick", "--section", "memory", "--out", str(path)])


def test_the_measurement_for_a_card_runs_on_a_cpu_but_for_its_copy():
    found = averaging_gpu.measure(quick=True, device="cpu")
    for configuration in found["by configuration"].values():
        assert configuration["paired steps"]["averaged / bare"]["median"] > 0
        assert configuration["averages"]["swaft"]["host_bytes"] > 0
        assert configuration["copy"] is None
    printed = [line[0] for line in averaging_gpu.rows(found)]
    assert sum("device memory" in line for line in printed) == len(found["by configuration"])
