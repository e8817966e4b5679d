"""A target for bugs that are put in on purpose."""

from __future__ import annotations

import jax

from specjax import drafters, testing

VOCAB = 3
TABLE = testing.random_table(jax.random.key(11), order=2, vocab_size=VOCAB, sharpness=1.5)
MODEL = testing.table_model(2, VOCAB)
DRAFTER = drafters.draft_model(MODEL)
