"""Timing plain decoding and speculation in turn, on a clock of its own."""

from __future__ import annotations

import types

import pytest

from specjax.cli import batches


class _Batch:
    """Takes as long as told, and notes what ran."""

    def __init__(self, clock, plain, speculative):
        self.task = types.SimpleNamespace(max_new_tokens=8)
        self.clock, self.seconds, self.ran = clock, {"plain": plain, "speculate": speculative}, []

    def _run(self, name, limit):
        if limit > 2:
            self.ran.append(name)
            self.clock.now += self.seconds[name][self.ran.count(name) - 1]

    def plain(self, limit):
        self._run("plain", limit)
        return types.SimpleNamespace(new_tokens=lambda: [[1]])

    def speculate(self, limit):
        self._run("speculate", limit)
        return types.SimpleNamespace(new_tokens=lambda: [[1]])

    def warm_up_calls(self):
        self.ran.append("warm up")


@pytest.mark.parametrize(
    ("plain", "speculative", "shown", "wanted"),
    [
        ([0.9, 0.1, 0.3, 0.1, 0.2, 0.1], [0.5, 0.02, 0.01, 0.05, 0.01, 0.02], 0.5, (0.02, 0.1, 5)),
        ([1.5, 1.0, 1.2], [0.3, 0.3, 0.5], 0.4, (0.4, 1.1, 2)),  # patience ends
        ([3.0], [2.0], 9.0, (2.0, 3.0, 1)),  # a showing is no call
        ([30.0], [], 11.0, (11.0, 30.0, 1)),  # the run that was shown is all there is
    ],
    ids=["short", "longer", "once", "long"],
)
def test_medians_of_runs_in_turn(monkeypatch, plain, speculative, shown, wanted):
    """Catches plain and speculative mixed up, a showing that counts, measuring without end, and a first short turn
    that counts: what it runs for the first time made idle machines look busy."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(batches.time, "perf_counter", lambda: clock.now)
    batch = _Batch(clock, plain, speculative)
    found = batches.run_in_turn(batch, shown)
    assert (found.speculative, found.plain, len(found.turns)) == pytest.approx(wanted)
    assert found.tokens == [[1]]
    if len(plain) > len(found.turns):
        assert (plain[0], speculative[0]) not in found.turns
    in_turn = ["warm up"] + ["plain", "speculate"] * len(speculative)
    assert batch.ran == (in_turn if speculative else ["plain"])
