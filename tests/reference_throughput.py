"""The policy of `controllers.throughput` once more, in plain NumPy: short, and slow."""

from __future__ import annotations

import math

import numpy as np


class Reference:
    """One batch. K is the profile's longest draft; the profile has one context."""

    def __init__(self, profile, batch, prior=0.7, exploration=0.01):
        self.found, self.longest, self.prior = profile.at(batch, 0), profile.longest, prior
        self.recent, self.long = ([np.zeros((batch, self.longest)) for _ in range(2)] for _ in range(2))
        self.least, self.most = exploration, 10 * exploration
        self.idle, self.saved, self.share = 0, 0.0, self.most / 2
        self.failures = np.zeros(batch, int)

    def draft_len(self, lengths, limits, room, active, rounds):
        step, one = self.found.rounds[:2]
        if all((k + 1) * step <= cost for k, cost in enumerate(self.found.rounds)):
            return 0
        needed = []
        for k in range(self.longest + 1):
            needs = [
                (limits[row] - lengths[row]) / self._tokens(row, min(k, room[row])) for row in np.flatnonzero(active)
            ]
            needed.append(sum(value**8 for value in needs) ** 0.125 * self.found.rounds[k])
        best = int(np.argmin(needed))
        missed = min(self.idle, max(rounds))
        price = one - step + (missed > 0) * self.found.catch_up[0] + missed * self.found.catch_up[1]
        if self.long[1].sum() == 0 or (best == 0 and self.saved * step >= price):
            return 1
        return best

    def _known(self, place):
        accepted, tested = self.long
        everywhere = (2 * self.prior + accepted.sum()) / (2 + tested.sum())
        return (2 * everywhere + accepted[:, place].sum()) / (2 + tested[:, place].sum())

    def _tokens(self, row, size):
        total = reach = 1.0
        for place in range(size):
            own = (2 * self._known(place) + self.recent[0][row, place]) / (2 + self.recent[1][row, place])
            if place == 0 and self.failures[row]:
                own = min(own, 1 - 0.2 ** (1 / self.failures[row]))
            reach *= own
            total += reach
        return total

    def _usually_pays(self):
        tokens = 1 + np.cumsum(np.cumprod([self._known(place) for place in range(self.longest)]))
        return any(tokens / self.found.rounds[1:] > 1 / self.found.rounds[0])

    def update(self, drafted, accepted, emitted):
        if max(drafted) == 0:
            self.idle += 1
            self.saved += self.share
            return
        succeeded = failed = 0
        pays, is_new = self._usually_pays(), self.long[1].sum() == 0
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
            succeeded, failed = succeeded + (accepted[row] > 0), failed + (accepted[row] == 0)
        if max(drafted) == 1 and (self.idle > 0 or self.saved > 0 or is_new):
            again = pays and succeeded >= failed
            self.saved = math.inf if again else 0.0
            self.share = min(max(self.share * (2 if again else 0.5), self.least), self.most)
        else:
            self.saved, self.share = 0.0, self.most
        self.idle = 0
