"""The throughput policy by what a user sees of it: lengths, losses, and how soon it follows the text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up import profile, round_of

import specjax
from specjax import controllers

CHEAP = profile()
DEAR = profile((1.0, 2.5, 4.0, 5.5))  # not even a perfect draft pays


@pytest.mark.parametrize(
    ("table", "alpha", "best"),
    [(CHEAP, 0.9, 3), (CHEAP, 0.02, 0), (profile((1.0, 1.3, 2.2, 3.2)), 0.8, 1), (DEAR, 0.95, 0)],
    ids=["cheap and easy", "cheap and hopeless", "only one pays", "dear"],
)
def test_the_length_that_pays_most_is_found(table, alpha, best):
    """Catches a wrong estimate, cost or minimum: texts of one acceptance, of which the best length is known; nine
    tenths of 300 rounds after the first 60 take it, and cost at most 1.1 of it, in each of five runs."""
    rng, costs = np.random.default_rng(2), np.array(table.costs[0].rounds)
    turn = _turn(controllers.throughput(table))
    for _ in range(5):
        state, sizes, emitted = controllers.throughput(table).init(1), [], 0
        for index in range(360):
            longest = rng.geometric(1 - alpha) - 1
            state, size = turn(state, np.array([longest], np.int32))
            sizes.append(int(size))
            emitted += 1 + min(longest, int(size)) if index >= 60 else 0
        after = np.array(sizes[60:])
        assert np.mean(after == best) > 0.9
        expected = sum(alpha**step for step in range(best + 1))
        assert costs[after].sum() / emitted < 1.1 * costs[best] / expected


def test_nothing_is_tried_that_cannot_end_the_batch_sooner():
    """Catches probes paid for while a row that may draft nothing decides when the batch ends."""
    controller = controllers.throughput(profile((1.0, 1.2, 1.25, 1.3)))
    rows = _Rows(limits=[200, 200], lengths=(2, 2)).arrays()
    held_up = rows._replace(draft_limits=jnp.array([0, 3], jnp.int32))
    state = controller.init(2)._replace(waited=jnp.int32(1000))
    assert controller.draft_len(state, held_up).tolist() == [0, 0]
    hopeless = state._replace(tested=jnp.full((2,), 99.0))
    assert controller.draft_len(hopeless, rows).tolist() == [1, 1]
    shorter = held_up._replace(limits=jnp.array([20, 200], jnp.int32))
    assert controller.draft_len(hopeless, shorter).tolist() == [1, 1]  # the other one ends later


def test_drafts_begin_when_the_row_that_held_them_up_has_ended():
    """Catches a decision not to draft that outlives its reason: one row may draft nothing, and ends."""
    controller = controllers.throughput(profile((1.0, 1.2, 1.25, 1.3)))
    rows = _Rows(limits=[200, 200], lengths=(2, 2))
    held_up = rows.arrays()._replace(draft_limits=jnp.array([0, 3], jnp.int32))
    state = controller.update(controller.init(2), round_of([0, 3], [0, 3], [1, 4]))
    for _ in range(3):
        assert controller.draft_len(state, held_up).tolist() == [0, 0]
        state = controller.update(state, round_of([0, 0], [0, 0], [1, 1]))
    rows.active[0] = False
    assert controller.draft_len(state, rows.arrays()).tolist() == [3, 3]


class _Rows:
    """As much of `types.Rows` as the controller reads."""

    def __init__(self, limits, lengths=(9, 5, 3)):
        self.limits, self.lengths, self.active = np.array(limits), np.array(lengths), np.ones(len(lengths), bool)

    def arrays(self):
        fields = dict.fromkeys(specjax.types.Rows._fields)
        status = np.where(self.active, specjax.Status.ACTIVE, specjax.Status.LENGTH)
        given = {
            "limits": self.limits,
            "lengths": self.lengths,
            "draft_limits": np.full(len(self.limits), 10),
            "status": status,
        }
        return specjax.types.Rows(**{**fields, **{name: jnp.asarray(x, jnp.int32) for name, x in given.items()}})


def _turn(controller):
    """One round of one row far from its limit, in which the target would accept `longest` [1] draft tokens."""
    rows = _Rows(limits=[10_000], lengths=[9]).arrays()

    @jax.jit
    def turn(state, longest):
        size = controller.draft_len(state, rows)
        accepted = jnp.minimum(size, longest)
        return controller.update(state, round_of(size, accepted, accepted + 1)), size[0]

    return turn


def test_a_pair_that_disappoints_at_first_gets_another_chance():
    """Catches plain decoding for good after one hopeless text: drafts of three gain nearly a half in all that come
    after it, where a probe is dear. 40 runs; in nine of ten more than half of the rounds of the sixth to eighth text
    after it draft."""
    rng = np.random.default_rng(6)
    controller = controllers.throughput(profile((1.0, 1.7, 2.0, 2.2), change=0.8))
    turn, drafted = _turn(controller), []
    for _ in range(40):
        state, taken = controller.init(1), []
        for alpha in (0.0, *[0.85] * 8):
            for _ in range(100):
                state, size = turn(state, np.array([rng.geometric(1 - alpha) - 1], np.int32))
                taken.append(int(size) > 0)
            state = controller.begin(state)
        drafted.append(np.mean(taken[600:]))
    assert np.quantile(drafted, 0.1) > 0.5


def test_losses_are_bounded_whatever_was_expected():
    """Catches drafts that go on losing because more is always expected of them. This text accepts what a probe drafts
    and nothing of a longer draft, so probes give hope for ever. In 3,000 rounds longer drafts lose no more than the 24
    plain steps of the ledger and the round that crosses the line; without a ledger they lose 122."""
    costs = (1.0, 2.2, 2.3, 2.4)
    controller = controllers.throughput(profile(costs))
    rows = _Rows(limits=[10_000], lengths=[9]).arrays()

    @jax.jit
    def turn(state):
        size = controller.draft_len(state, rows)
        accepted = jnp.where(size == 1, 1, 0)
        return controller.update(state, round_of(size, accepted, accepted + 1)), size[0]

    state, sizes = controller.init(1), []
    for _ in range(3000):
        state, size = turn(state)
        sizes.append(int(size))
    drafts = [size for size in sizes if size > 1]
    assert sum(costs[size] - 1 for size in drafts) < 24 + costs[3]
    assert len(drafts) > 10  # they were expected to pay
    assert sizes[-200:].count(1) > 5  # and are still tried


def test_a_draft_that_is_never_right_is_tried_less_and_less():
    """Catches probes at a constant rate, or begun anew with every text: over 24 texts after the first twelve they cost
    less than 0.4%."""
    steps = _sixteen_rows(np.random.default_rng(5), [np.zeros(16)] * 36)
    assert 0 <= sum(steps[12:]) - 24 * 128 < 0.004 * 24 * 128


def _sixteen_rows(rng, chances):
    """Plain steps that each of several batches takes, each row's drafts accepted with its chance, of 128 tokens."""
    costs = (1.0, 1.6, 2.2, 2.5)
    controller = controllers.throughput(profile(costs, batch=16))
    choose, update, begin = (jax.jit(each) for each in (controller.draft_len, controller.update, controller.begin))
    state, steps = controller.init(16), []
    for each in chances:
        rows = _Rows(limits=[137] * 16, lengths=[9] * 16)
        steps.append(0.0)
        while rows.active.any():
            size = int(choose(state, rows.arrays())[0])
            steps[-1] += costs[size]
            drafted = np.where(rows.active, np.minimum(size, rows.limits - rows.lengths - 1), 0)
            accepted = np.minimum(rng.geometric(1 - each) - 1, drafted)
            emitted = np.where(rows.active, accepted + 1, 0)
            state = update(state, round_of(drafted, accepted, emitted))
            rows.lengths = rows.lengths + emitted
            rows.active = rows.lengths < rows.limits
        state = begin(state)
    return steps


def test_a_shift_is_followed():
    """Catches evidence that outweighs what the text now does, and waiting for ever. Acceptance falls from 0.9 to 0
    after 60 rounds: 20 rounds later three quarters of 40 runs cost less than 1.1 plain steps a round. It rises again
    after another 40: within 60 rounds, a wait of 24 doubled and some rounds of doubt, half of them draft all they
    can."""
    rng = np.random.default_rng(1)
    table = profile((1.0, 1.05, 1.1, 1.15))
    costs, controller = table.costs[0].rounds, controllers.throughput(table)
    turn = _turn(controller)
    fallen, risen = [], []
    for _ in range(40):
        state, taken = controller.init(1), []
        for index in range(220):
            alpha = 0.0 if 60 <= index < 100 else 0.9
            state, size = turn(state, np.array([rng.geometric(1 - alpha) - 1], np.int32))
            taken.append(int(size))
        fallen.append(np.mean([costs[size] for size in taken[80:100]]))
        risen.append(np.mean([size == 3 for size in taken[160:]]))
    assert np.quantile(fallen, 0.75) < 1.1
    assert np.median(risen) > 0.8
