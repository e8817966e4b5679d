"""The policy of `controllers.throughput` once more, in plain NumPy: short, and slow."""

from __future__ import annotations

import math

import numpy as np


class Reference:
    """One batch. K is the profile's longest draft; the profile has one context."""

    def __init__(self, profile, batch, prior=0.7, exploration=0.01):
        self.found, self.longest, self.prior = profile.at(batch, 0), profile.longest, prior
        self.recent, self.long = ([np.zeros((batch, self.longest)) for _ in range(2)] for _ in range(2))
        self.soon, self.late = self._wait(10 * exploration), self._wait(exploration)
        self.idle, self.patience, self.wait = 0, self.soon, min(2 * self.soon, self.late)
        self.failures = np.zeros(batch, int)

    def _wait(self, share):
        step, one = self.found.rounds[:2]
        left = share * step - self.found.catch_up
        return 256 if left <= 0 else min(max(math.ceil(max(one - step, 0) / left), 1), 256)

    def draft_len(self, lengths, limits, room, active):
        step = self.found.rounds[0]
        if all((k + 1) * step <= cost for k, cost in enumerate(self.found.rounds)):
            return 0
        needed = []
        for k in range(self.longest + 1):
            rounds = [
                (limits[row] - lengths[row]) / self._tokens(row, min(k, room[row])) for row in np.flatnonzero(active)
            ]
            needed.append(sum(value**8 for value in rounds) ** 0.125 * self.found.rounds[k])
        best = int(np.argmin(needed))
        if self.long[1].sum() == 0 or (best == 0 and self.idle >= self.patience):
            return 1
        return best

    def _tokens(self, row, size):
        accepted, tested = self.long
        everywhere = (2 * self.prior + accepted.sum()) / (2 + tested.sum())
        total = reach = 1.0
        for place in range(size):
            known = (2 * everywhere + accepted[:, place].sum()) / (2 + tested[:, place].sum())
            own = (2 * known + self.recent[0][row, place]) / (2 + self.recent[1][row, place])
            if place == 0 and self.failures[row]:
                own = min(own, 1 - 0.2 ** (1 / self.failures[row]))
            reach *= own
            total += reach
        return total

    def update(self, drafted, accepted, emitted):
        if max(drafted) == 0:
            self.idle += 1
            return
        succeeded = failed = 0
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
        if max(drafted) == 1 and self.idle >= self.patience:
            if succeeded >= failed:
                self.patience, self.wait = 0, max(self.wait // 2, min(2 * self.soon, self.late))
            else:
                self.patience, self.wait = self.wait, min(2 * self.wait, self.late)
        else:
            self.patience, self.wait = self.soon, min(2 * self.soon, self.late)
        self.idle = 0
