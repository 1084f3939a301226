"""Tests of the number of engines that an autoscaler wants, on a clock of their own."""
import pytest

from qwen_jax.cluster.ray_serve.autoscaling import Autoscaler
from qwen_jax.cluster.ray_serve.config import Autoscaling
from qwen_jax.structs import convert


def scaler(**options):
    return Autoscaler(convert({"min": 1, "max": 8, "target": 10.0, "up_seconds": 5.0, "down_seconds": 60.0, **options},
                              Autoscaling, "replicas"))


def test_more_when_they_were_needed_all_the_time():
    wants = scaler()
    assert [wants.wanted(float(now), 35, 2) for now in range(7)] == [2] * 5 + [4] * 2
    wants = scaler()  # a burst that ends sooner changes nothing, nor does the highest need count
    assert [wants.wanted(now, requests, 2) for now, requests in ((0.0, 80), (4.0, 20), (5.0, 80), (9.0, 30), (10.0, 80))
            ] == [2, 2, 2, 2, 3]


def test_fewer_when_they_were_not_needed_for_long():
    wants = scaler()
    loads = {0: 0, 30: 25, 59: 0, 60: 0}
    assert [wants.wanted(float(now), requests, 4) for now, requests in loads.items()] == [4, 4, 4, 3]


def test_never_beyond_its_bounds():
    wants = scaler(up_seconds=0.0, down_seconds=0.0)
    assert wants.wanted(0.0, 10_000, 2) == 8 and wants.wanted(1.0, 0, 8) == 1
    assert wants.wanted(2.0, 0, 0) == 1  # one died


def test_a_day_of_load_is_followed_without_flapping():
    wants, engines, changes = scaler(), 1, 0
    for minute in range(24 * 60):
        load = 60 if 9 * 60 <= minute < 17 * 60 else 8
        load += 9 * (minute % 7 == 0)  # spikes shorter than down_seconds do not end and begin engines
        wanted = wants.wanted(60.0 * minute, load, engines)
        changes += wanted != engines
        engines = wanted
    assert engines == 1 or engines == 2
    assert changes <= 12


@pytest.mark.parametrize("wrong", [{"min": 3, "max": 2}, {"target": 0.0}, {"min": 0}, {"up_seconds": -1.0}])
def test_bounds_are_checked(wrong):
    with pytest.raises(ValueError):
        scaler(**wrong)
