"""What every third-party module must pass; run by the scripts beside it, in an environment of their own."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

import specjax
from specjax import controllers, testing
from specjax.decode import api

PROMPTS = np.array([[1, 2, 3, 4, 5], [5, 0, 0, 0, 0], [3, 1, 4, 0, 0]])
LENGTHS = np.array([5, 1, 3])
NEW, SAMPLES = 12, 20_000


def stirred(params, scale=0.3, seed=7):
    """Parameters with noise: fresh modules hold zeros. Embeddings get little of it: where they are the output layer
    too, a module that is all embedding says its last token again for ever."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def one(path, leaf, key):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        quiet = 0.1 if "embed" in jax.tree_util.keystr(path) else 1.0
        return quiet * leaf + (quiet * scale * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

    return structure.unflatten([one(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)])


def try_all(name, packages, adapt, own_logits):
    """Adapts, compares, prints one line of JSON; an AssertionError is a failure.

    Args:
      name: of the module.
      packages: whose versions are named.
      adapt: () -> Adapted.
      own_logits: (params, tokens [B, T]) -> logits, calling the module as its authors do, without a cache.
    """
    began = time.perf_counter()
    adapted = adapt()
    seconds = time.perf_counter() - began
    model, params = adapted.model, adapted.params
    checks = testing.check_model(model, params)

    draft = specjax.drafters.draft_model(model)
    noisy = jax.tree.map(lambda one, other: one + 0.12 * (other - one), params, stirred(params, seed=8))
    out = specjax.generate(
        model, params, draft, noisy, PROMPTS, LENGTHS, max_new_tokens=NEW, controller=controllers.fixed(3)
    )
    assert out.new_tokens() == _greedy(own_logits, params), "not the module's own greedy text"
    tested, accepted = int(out.stats.tested.sum()), int(out.stats.accepted.sum())
    assert 0 < accepted < tested, (accepted, tested)

    programs = api._generate._cache_size()
    changed = specjax.generate(
        model, noisy, draft, params, PROMPTS, LENGTHS, max_new_tokens=NEW, controller=controllers.fixed(3)
    )
    assert api._generate._cache_size() == programs, "other parameters compiled another program"
    assert changed.new_tokens() == _greedy(own_logits, noisy), "the old parameters' text"

    _sampled(adapted, draft, noisy, own_logits)
    sys.stdout.write(json.dumps({
        "module": name, "strategy": adapted.strategy, "trees": model.trees, "checks": len(checks),
        "accepted": f"{accepted}/{tested}", "seconds to adapt": round(seconds, 1),
        "versions": {package: version(package) for package in (*packages, "jax", "flax")},
    }) + "\n")  # fmt: skip


def _greedy(own_logits, params):
    whole = jax.jit(own_logits)
    texts = []
    for prompt, length in zip(PROMPTS.tolist(), LENGTHS.tolist(), strict=True):
        text = prompt[:length]
        for _ in range(NEW):
            padded = jnp.asarray([text + [0] * (len(prompt) + NEW - len(text))])
            text.append(int(jnp.argmax(whole(params, padded)[0, len(text) - 1])))
        texts.append(text[length:])
    return texts


def _sampled(adapted, draft, draft_params, own_logits):
    """20,000 texts of three tokens, one from the prompt and two by rounds, against the module's own distribution,
    enumerated over all texts from its own logits; false alarms 1e-6."""
    prompt, sampling = [3, 1], specjax.Sampling(temperature=1.0, top_k=5)
    out = specjax.generate(
        adapted.model, adapted.params, draft, draft_params, jnp.tile(jnp.array([prompt]), (SAMPLES, 1)),
        max_new_tokens=3, sampling=sampling, controller=controllers.fixed(1),
    )  # fmt: skip
    vocab = adapted.model.vocab_size
    whole = jax.jit(own_logits)
    first = testing.numpy_probs(np.asarray(whole(adapted.params, jnp.array([prompt])))[0, -1, :vocab], sampling)
    texts = jnp.array([[*prompt, token] for token in range(vocab)])
    second = [testing.numpy_probs(row[:vocab], sampling) for row in np.asarray(whole(adapted.params, texts))[:, -1]]
    probs = np.zeros((vocab, vocab, vocab))
    pairs = jnp.array([[*prompt, a, b] for a in range(vocab) for b in range(vocab)])
    third = np.asarray(whole(adapted.params, pairs))[:, -1, :vocab]
    for index, (a, b) in enumerate(np.ndindex(vocab, vocab)):
        if first[a] and second[a][b]:
            probs[a, b] = first[a] * second[a][b] * testing.numpy_probs(third[index], sampling)
    testing.assert_same_distribution(testing.count_sequences(out.tokens, len(prompt), 3, vocab), probs)
