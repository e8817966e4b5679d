"""The policy of `controllers.throughput` once more, in plain NumPy: short, and slow."""

from __future__ import annotations

import math

import numpy as np


class Reference:
    """One batch. K is the profile's longest draft; the profile has one context."""

    def __init__(self, profile, batch, prior=0.7, exploration=0.01):
        self.found, self.longest, self.prior = profile.at(batch, 0), profile.longest, prior
        self.recent, self.long = ([np.zeros((batch, self.longest)) for _ in range(2)] for _ in range(2))
        self.least, self.most = exploration, 16 * exploration
        self.idle, self.saved, self.share, self.hot = 0, 0.0, self.most / 2, False
        self.failures, self.trust, self.took_part = np.zeros(batch, int), 1.0, 0

    def draft_len(self, lengths, limits, room, active):
        step = self.found.rounds[0]
        if all((k + 1) * step <= cost for k, cost in enumerate(self.found.rounds)):
            return 0
        price = self._price()
        affordable = self.saved >= price or (self.hot and self.saved > (0.5 - 8 * self.trust) * price)
        if not affordable and self.idle % 32 and np.sum(active) == self.took_part:
            return 0
        needed = []
        for k in range(self.longest + 1):
            needs = [
                (limits[row] - lengths[row]) / self._tokens(row, min(k, room[row])) for row in np.flatnonzero(active)
            ]
            rounds = self._last(np.array(needs), (limits - lengths)[active])
            needed.append(rounds * self.found.rounds[k] + self._change(k))
        best = int(np.argmin(needed))
        left, rooms = (limits - lengths)[active], np.asarray(room)[active]
        perfect = [
            max(left / (1 + np.minimum(k, rooms))) * cost + self._change(k) for k, cost in enumerate(self.found.rounds)
        ]
        wanted = self.long[1].sum() == 0 or (best == 0 and affordable)
        return 1 if wanted and min(perfect[1:]) < needed[0] else best

    def _change(self, k):
        if k == 0:
            return self.found.catch_up[0] if self.idle == 0 and self.took_part else 0
        return self.idle * self.found.catch_up[1]

    def _last(self, needs, most):
        spread = max(0.1 * max(most - needs), 1e-3)
        return min(max(needs) + spread * np.log(np.sum(np.exp((needs - max(needs)) / spread))), max(most))

    def _price(self):
        step, one = self.found.rounds[:2]
        late = self.found.catch_up[0] + self.idle * self.found.catch_up[1] if self.idle else 0
        return (one - step + late) / step

    def _everywhere(self):
        accepted, tested = self.long
        return (8 * self.prior + accepted.sum()) / (8 + tested.sum())

    def _known(self, place):
        accepted, tested = self.long
        first = (8 * self.prior + accepted[:, 0].sum()) / (8 + tested[:, 0].sum())
        expected = (2 * first + place) / (2 + place)
        return (8 * expected + accepted[:, place].sum()) / (8 + tested[:, place].sum())

    def _tokens(self, row, size):
        total = reach = 1.0
        whole = (16 * self._everywhere() + self.recent[0][row].sum()) / (16 + self.recent[1][row].sum())
        for place in range(size):
            odds = _odds(self._known(place)) * _odds(whole) / _odds(self._everywhere())
            own = (8 * odds / (1 + odds) + self.recent[0][row, place]) / (8 + self.recent[1][row, place])
            if place == 0 and self.failures[row]:
                own = min(own, 1 - 0.2 ** (1 / self.failures[row]))
            reach *= own
            total += reach
        return total

    def _usual(self):
        hoped = (8 + self.long[0].sum()) / (8 + self.long[1].sum())
        chances = [max(self._known(place), hoped) for place in range(self.longest)]
        return 1 + np.concatenate([[0], np.cumsum(np.cumprod(chances))])

    def _gain(self, tokens):
        return max((tokens / self.found.rounds * self.found.rounds[0])[1:]) - 1

    def begin(self):
        self.recent = [np.zeros_like(counts) for counts in self.recent]
        self.failures, self.idle, self.hot = np.zeros_like(self.failures), 0, False
        self.saved, self.took_part = max(self.saved, 0), 0

    def update(self, drafted, accepted, emitted):
        begins, self.took_part = self.took_part == 0, np.sum(emitted > 0)
        if max(drafted) == 0:
            if self.idle == 0 and self.saved < -0.5 * self._price():
                self.trust = max(0.7 * self.trust, 1 / 16)
            self.idle, self.hot = self.idle + 1, False
            self.saved += self.share
            return
        price = self._price()
        for row, size in enumerate(drafted):
            if size == 0:
                continue
            for record, fade in ((self.recent, math.exp(-1 / 12)), (self.long, math.exp(-1 / 256))):
                record[0][row] *= fade
                record[1][row] *= fade
                for place in range(min(accepted[row] + 1, size, emitted[row])):
                    record[1][row, place] += 1
                    record[0][row, place] += place < accepted[row]
            self.failures[row] = 0 if accepted[row] else self.failures[row] + 1
        usual, hoped = self._usual(), []
        for row in np.flatnonzero(drafted):
            own = np.array([self._tokens(row, k) for k in range(self.longest + 1)])
            hoped.append(1 / (usual if accepted[row] else own))
        again = self._gain(1 / np.mean(hoped, 0)) > 0
        was_hot, self.hot = self.hot, False
        is_try = max(drafted) == 1 and (self.idle > 0 or was_hot or begins)
        owed = min(self.saved - price, 0)
        pays = not is_try or owed < -(8 * self.trust + 0.5) * price
        if pays:
            self.trust, owed = min(1.4 * self.trust, 1), 0
        most = min(max(0.35 * self.trust * self._gain(usual), self.least), self.most)
        if is_try:
            self.hot, self.saved = again, owed
            self.share = min(max(self.share * (2 if again else 0.7), self.least), most)
        else:
            self.saved, self.share = 0.0, most
        self.idle = 0


def _odds(share):
    share = min(max(share, 1e-3), 1 - 1e-3)
    return share / (1 - share)
