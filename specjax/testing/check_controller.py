"""The contract of a Controller: the output is always the target's (the same tokens or the same distribution)."""

from __future__ import annotations

from specjax import integers, verify
from specjax.testing.cases import check_distributions, check_greedy, check_rows, opponents
from specjax.types import Controller, Verifier


def check_controller(
    controller: Controller,
    *,
    verifier: Verifier | None = None,
    rows_apart: bool = True,
    samples: int = 10_000,
    false_alarm: float = 1e-6,
) -> list[str]:
    """Checks `controller` on a target that can be enumerated, with seven drafters made to break a verifier.

    Greedy output must equal greedy decoding. Sequences of 5 tokens at three settings are compared with their exact
    distribution by a chi-square test. The test fails if a draft length depends on the noise of verification, or on a
    token that is then left out. Each sequence is a batch of its own.

    Args:
      controller: under test.
      verifier: default `verify.rejection()`; `verify.block()` judges a draft as a whole, and so its end.
      rows_apart: False for a controller that decides for the batch as a whole.
      samples: sequences a case; 100 or more.
      false_alarm: bound on the chance that an exact one fails a case.

    Returns:
      What was checked, one line each.

    Raises:
      AssertionError: which case failed, and how.

    >>> from specjax import controllers, testing
    >>> len(testing.check_controller(controllers.fixed(2), samples=300))
    35
    """
    if not isinstance(controller, Controller):
        raise ValueError(f"controller must be a specjax.Controller, got {type(controller).__name__}: call its maker.")
    samples = integers.static(samples, "samples", least=100)
    false_alarm = integers.real(false_alarm, "false_alarm", lambda x: 0 < x < 1, "between 0 and 1")
    rule = verifier or verify.rejection()
    done = []
    for adversary in opponents():
        done.append(check_greedy(adversary, rule, controller))
        if rows_apart:
            done.append(check_rows(adversary, rule, controller))
        done += check_distributions(
            adversary, rule, controller, length=5, samples=samples, false_alarm=false_alarm, said="this controller",
            alone=True,
        )  # fmt: skip
    return done
