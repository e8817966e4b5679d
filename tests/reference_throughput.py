"""The policy of `controllers.throughput` once more, in plain NumPy: short, and slow."""

from __future__ import annotations

import math

import numpy as np

KINDS = np.array([0.02, 0.1, 0.25, 0.45, 0.65, 0.8, 0.9, 0.96, 0.99])
BETWEEN = np.array([0, 0.06, 0.175, 0.35, 0.55, 0.725, 0.85, 0.93, 0.975, 1])


class Reference:
    """One batch. K is the profile's longest draft; the profile has one context."""

    def __init__(self, profile, batch, prior=0.7, exploration=0.01):
        self.found, self.longest, self.buckets = profile.at(batch, 0), profile.longest, profile.buckets
        beta = KINDS ** (4 * prior - 1) * (1 - KINDS) ** (4 * (1 - prior) - 1) * np.diff(BETWEEN)
        self.expected, self.counts = beta / beta.sum(), np.zeros(len(KINDS))
        self.rows = [self._usual() for _ in range(batch)]
        self.least, self.most = exploration / np.sqrt(batch), 16 * exploration
        self.idle, self.saved, self.share, self.hot, self.refused = 0, 0.0, self.most / 2, False, False
        self.trust, self.took_part, self.last = 1.0, 0, 0
        self.emitted, self.earlier, self.steps = np.zeros(batch, int), 0.0, 0.0

    def draft_len(self, lengths, limits, room, active):
        step = self.found.rounds[0]
        if all((k + 1) * step <= cost for k, cost in enumerate(self.found.rounds)):
            return 0
        price = self._price()
        affordable = self.saved >= price or (self.hot and self.saved > (0.5 - 8 * self.trust) * price)
        if not affordable and self.idle % 32 and np.sum(active) == self.took_part:
            return 0
        left, rooms = (limits - lengths)[active], np.asarray(room)[active]
        near = 64 * (1 - (63 / 64) ** left)
        costs = np.array(self.found.rounds)
        rest = (left - near) * min(costs / [_tokens(self._usual(), k) for k in range(self.longest + 1)])
        spread = 0.1 * step * np.sqrt(64 * max(left))
        needed = []
        for k in range(self.longest + 1):
            tokens = [_tokens(self.rows[row], min(k, room[row])) for row in np.flatnonzero(active)]
            seconds = near / tokens * costs[k] + rest
            needed.append(spread * np.log(np.sum(np.exp(seconds / spread))) + self._change(k))
        whole = np.where(active, limits - lengths, 0) + self.emitted
        is_behind = self.earlier + max(whole) - max(left) - self.steps <= -24
        self.refused = is_behind and np.argmin(needed) > 0
        best = 0 if is_behind else int(np.argmin(needed))
        perfect = [max(left / (1 + np.minimum(k, rooms))) * cost + self._change(k) for k, cost in enumerate(costs)]
        if min(perfect[1:]) >= perfect[0]:
            return 0
        return 1 if self.counts.sum() == 0 or (best == 0 and affordable) else best

    def _change(self, k):
        if self.last == 0:
            return 0 if k == 0 else self.idle * self.found.catch_up[1]
        of_this, of_last = (min(b for b in self.buckets if b >= size) for size in (k, self.last))
        return self.found.catch_up[0] * (1 if k == 0 else 0 if of_this == of_last else 0.5)

    def _price(self):
        step, one = self.found.rounds[:2]
        begins = self.idle or not self.took_part
        late = self.found.catch_up[0] + self.idle * self.found.catch_up[1] if begins else 0
        return (one - step + late) / step

    def _usual(self, hope=0):
        counts = 8 * self.expected + self.counts
        counts[-1] += hope
        return counts / counts.sum()

    def _later(self, law, tokens):
        for _ in range(tokens):
            law = law + (self._usual() - law) / 64
        return law

    def _gain(self, tokens):
        return max((tokens / self.found.rounds * self.found.rounds[0])[1:]) - 1

    def begin(self):
        self.rows = [self._usual() for _ in self.rows]
        self.idle, self.hot = 0, False
        self.saved, self.took_part, self.last = max(self.saved, 0), 0, 0
        self.earlier = min(max(self.earlier + max(self.emitted) - self.steps, -48), 64)
        self.emitted, self.steps = np.zeros_like(self.emitted), 0.0

    def update(self, drafted, accepted, emitted):
        begins, price, drafts = self.took_part == 0, self._price(), max(drafted)
        self.steps += (self.found.rounds[drafts] + self._change(drafts)) / self.found.rounds[0]
        self.steps -= 0 if drafts else self.least
        self.emitted, self.took_part, self.last = self.emitted + emitted, np.sum(emitted > 0), drafts
        if drafts == 0:
            if self.idle == 0 and self.saved < -0.5 * price:
                self.trust = max(0.7 * self.trust, 1 / 16)
            self.idle, self.hot = self.idle + 1, False
            self.saved += self.share
            return
        is_first = self.counts.sum() == 0
        part = np.flatnonzero(drafted)
        for row in part:
            law = self._later(self.rows[row], self.idle)
            for place in range(min(accepted[row] + 1, drafted[row], emitted[row])):
                law = law * (KINDS if place < accepted[row] else 1 - KINDS)
            self.rows[row] = law / law.sum()
        self.counts = self.counts * math.exp(-1 / 256) + sum(self.rows[row] for row in part)
        usual, hoped = np.array([_tokens(self._usual(hope=8), k) for k in range(self.longest + 1)]), []
        for row in part:
            self.rows[row] = self._later(self.rows[row], emitted[row])
            own = np.array([_tokens(self.rows[row], k) for k in range(self.longest + 1)])
            hoped.append(1 / (usual if accepted[row] else own))
        again = self._gain(1 / np.mean(hoped, 0)) > 0
        was_hot, self.hot = self.hot, False
        is_try = drafts == 1 and (self.idle > 0 or was_hot or begins)
        owed = min(self.saved - price, 0)
        pays = not is_try or owed < -(8 * self.trust + 0.5) * price
        if pays:
            self.trust = min(1.4 * self.trust, 1)
        if pays or is_first:
            owed = 0
        most = min(max(0.35 * self.trust * self._gain(usual), self.least), self.most)
        if is_try:
            self.hot, self.saved = again, owed
            self.share = min(max(self.share * (2 if again else 0.7), self.least), most)
        else:
            self.saved, self.share = 0.0, most
        self.idle = 0


def _tokens(law, size):
    """Of a draft of so many, and one more: it ends where one is not accepted."""
    return sum(np.dot(law, KINDS**place) for place in range(size + 1))
