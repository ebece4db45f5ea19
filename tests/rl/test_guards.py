"""Alarms: each kind shows when it should, once, and survives being saved."""

import json
import logging

import pytest

from rl.guards import Guards


def guards():
    watched = Guards.of(None)
    watched.observe_held_out(0.10)
    watched.observe(reward=0.5, entropy=8.0, hallucination=0.02)
    return watched


def observe(watched, **numbers):
    for _ in range(60):
        watched.observe(**{"reward": 0.5, "entropy": 8.0, "hallucination": 0.02, **numbers})


@pytest.mark.parametrize(
    ("numbers", "held_out", "expected"),
    [
        ({}, 0.10, []),
        ({"reward": 0.9}, 0.091, []),
        ({"reward": 0.9}, 0.089, ["reward-hacking"]),
        ({"reward": 0.4}, 0.08, []),
        ({"entropy": 2.0}, 0.10, ["entropy-collapse"]),
        ({"hallucination": 0.06}, 0.10, []),
        ({"hallucination": 0.09}, 0.10, ["hallucination"]),
    ],
)
def test_alarms_say_what_went_wrong(numbers, held_out, expected, caplog):
    watched = guards()
    observe(watched, **numbers)
    watched.observe_held_out(held_out)
    with caplog.at_level(logging.WARNING):
        assert watched.new_alarms() == expected
    assert [record.message.split(":")[0] for record in caplog.records] == expected


def test_an_alarm_is_given_once_also_after_a_restart():
    watched = guards()
    observe(watched, entropy=1.0)
    again = Guards.of(json.loads(json.dumps(vars(watched))))
    assert watched.new_alarms() == ["entropy-collapse"] and watched.new_alarms() == []
    assert again.new_alarms() == ["entropy-collapse"]
    assert Guards.of(json.loads(json.dumps(vars(again)))).new_alarms() == []


def test_another_metric_is_compared_with_itself_at_the_start():
    watched = guards()
    observe(watched, reward=0.9)
    watched.observe_held_out_again([0.05, 0.049])
    assert watched.new_alarms() == []
    watched.observe_held_out(0.04)
    assert watched.new_alarms() == ["reward-hacking"]
    watched.observe_held_out_again([])
    assert "held_out" not in {**watched.first, **watched.now}


def test_one_bad_step_is_no_alarm():
    watched = guards()
    watched.observe(reward=0.5, entropy=0.0, hallucination=0.3)
    assert watched.new_alarms() == []


def test_a_number_that_is_none_does_not_silence_the_guards(caplog):
    watched = Guards.of(None)
    watched.observe(reward=0.5, entropy=8.0, hallucination=0.0)
    watched.observe(reward=float("nan"), entropy=float("nan"), hallucination=float("inf"))
    for _ in range(60):
        watched.observe(reward=0.5, entropy=0.1, hallucination=0.0)
    assert watched.new_alarms() == ["entropy-collapse"]
