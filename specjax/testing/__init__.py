"""The exactness kit: models whose distribution is a small table, drafters that try to break a verifier, exact
distributions to compare with, and the contract of each role as one call. For specjax's own tests, and for anyone who
writes a part:

    from specjax import testing
    testing.check_drafter(my_drafter, my_params)
"""

from specjax.testing.adversaries import (
    Adversary,
    adversarial_tables,
    adversaries,
    constant_drafter,
    time_varying_drafter,
)
from specjax.testing.check_controller import check_controller
from specjax.testing.check_drafter import check_drafter
from specjax.testing.check_model import check_model
from specjax.testing.check_pair import Agreement, check_pair
from specjax.testing.check_verifier import check_verifier
from specjax.testing.distributions import assert_same_distribution, count_sequences, exact_sequence_probs, numpy_probs
from specjax.testing.tables import random_table, table_model

__all__ = [
    "Adversary",
    "Agreement",
    "adversarial_tables",
    "adversaries",
    "assert_same_distribution",
    "check_controller",
    "check_drafter",
    "check_model",
    "check_pair",
    "check_verifier",
    "constant_drafter",
    "count_sequences",
    "exact_sequence_probs",
    "numpy_probs",
    "random_table",
    "table_model",
    "time_varying_drafter",
]
