"""The contract of a Verifier: sequences of several rounds follow the target's distribution, whatever the drafter."""

from __future__ import annotations

from specjax import controllers, integers
from specjax.testing.cases import check_distributions, check_greedy, check_rows, opponents
from specjax.types import Verifier


def check_verifier(
    verifier: Verifier, *, lossless: bool = True, samples: int = 20_000, false_alarm: float = 1e-6
) -> list[str]:
    """Checks `verifier` on a target that can be enumerated, against drafters made to break it.

    Greedy output must equal greedy decoding, and no row may change with its neighbours, its rounds included. Where
    `lossless`, sequences of 4 tokens are drawn at three settings with every adversary, 1 and 3 draft tokens a round
    (up to 3 rounds), and compared with their exact distribution by a chi-square test.

    Args:
      verifier: under test.
      lossless: False for a rule that does not claim to follow the target's distribution.
      samples: sequences a case; 100 or more.
      false_alarm: bound on the chance that an exact verifier fails a case.

    Returns:
      What was checked, one line each.

    Raises:
      AssertionError: which case failed, and how.

    >>> from specjax import testing, verify
    >>> len(testing.check_verifier(verify.greedy()))
    14
    """
    if not isinstance(verifier, Verifier):
        raise ValueError(f"verifier must be a specjax.Verifier, got {type(verifier).__name__}: call its maker.")
    samples = integers.static(samples, "samples", least=100)
    false_alarm = integers.real(false_alarm, "false_alarm", lambda x: 0 < x < 1, "between 0 and 1")
    done = []
    for adversary in opponents():
        done += [check(adversary, verifier, controllers.fixed(3)) for check in (check_greedy, check_rows)]
        if lossless and not verifier.greedy_only:
            for draft_len in (1, 3):
                done += check_distributions(
                    adversary, verifier, controllers.fixed(draft_len), length=4, samples=samples,
                    false_alarm=false_alarm, said=f"K = {draft_len}",
                )  # fmt: skip
    return done
