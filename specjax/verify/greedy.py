"""Greedy verification: a draft token stays while it is the target's most likely one."""

from __future__ import annotations

import functools

from specjax.sampling import first_best
from specjax.types import Context, Draft, Target, Verdict, Verifier
from specjax.verify.prefix import matching


@functools.cache
def greedy() -> Verifier:
    """The output is that of greedy decoding, with any drafter; for temperature 0 only.

    The result is that of `rejection()` at temperature 0, without computing any distribution.

    >>> from specjax.verify import greedy
    >>> greedy().greedy_only
    True
    """
    return Verifier(verify=_verify, greedy_only=True)


def _verify(context: Context, draft: Draft, target: Target) -> Verdict:
    del context
    return matching(draft, first_best(target.logits))
