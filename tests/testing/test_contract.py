"""Every drafter with every verifier, processor and model: the output is the target's (same tokens or distribution)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import specjax
from specjax import Sampling, controllers, drafters, testing, verify
from specjax.testing import Adversary, constant_drafter, time_varying_drafter
from specjax.types import Verdict, Verifier

VOCAB, LENGTH, STOP = 4, 3, 3
SAMPLED = {"rejection": verify.rejection(), "block": verify.block()}
GREEDY = {"greedy": verify.greedy(), "typical": verify.typical_lossy(), "top-k": verify.top_k_lossy()}
NEUTRAL = Sampling(
    1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0,
    logit_bias=jnp.zeros(VOCAB), bad_words=[-1], min_new_tokens=0,
)  # fmt: skip
SETTINGS = {
    "nothing": NEUTRAL,
    "filters": NEUTRAL._replace(temperature=0.7, top_k=2, top_p=0.9),
    "penalties": NEUTRAL._replace(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.4),
    "bias, bad words, minimum length": NEUTRAL._replace(
        logit_bias=jnp.array([0.7, -0.3, 0.0, 0.5]), bad_words=[1], min_new_tokens=2
    ),
}
# The prompt says whether the processor below does anything: so with and without it are rows of one program.
PROMPTS = {"plain": [0, 1], "processor": [1, 0]}


def _processor(logits, tokens, length):
    """In texts that begin with 1: no token three times in a row."""
    last = tokens[length - 1]
    is_forbidden = (jnp.arange(VOCAB) == last) & (last == tokens[length - 2]) & (tokens[0] == 1)
    return jnp.where(is_forbidden, -jnp.inf, logits)


def _drafters(family):
    model, params = tiny.model(family, seed=1, vocab_size=VOCAB, **({} if family == "table" else _SMALL[family]))
    tables = testing.random_table(jax.random.key(4), order=2, vocab_size=VOCAB, sharpness=2.0)
    varying = jnp.stack([tables, -tables, 0 * tables])
    return [
        Adversary("draft_model", drafters.draft_model(model), params),
        Adversary("time-varying", time_varying_drafter(VOCAB), varying),
        Adversary("one-hot", constant_drafter(0), ()),
    ]


_SMALL = {"llama": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}}
FAMILIES = ["table", "llama", "gpt2"]
SAMPLES = {"table": 4000, "llama": 500, "gpt2": 500}


def _by_row(rules, which):
    """One verifier of many: row b is judged by rules[which[b]]. Rows never meet, so this is all of them at once."""

    def run(context, draft, target):
        verdicts = [rule.verify(context, draft, target) for rule in rules]
        return Verdict(*(
            jnp.stack([getattr(verdict, name) for verdict in verdicts])[which, jnp.arange(len(which))]
            for name in ("num_accepted", "next_token")
        ))  # fmt: skip

    return Verifier(run)


def _as_rows(settings):
    return Sampling(*(
        None if field[0] is None else jnp.stack([jnp.asarray(x) for x in field])
        for field in zip(*settings, strict=True)
    ))  # fmt: skip


@pytest.mark.parametrize("drafter", range(3), ids=["draft_model", "time-varying", "one-hot"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_output_follows_the_distribution(family, drafter):
    """Catches a combination of parts that is not exact. For each of 2 verifiers, 4 settings, with and without a custom
    processor: 4,000 texts (500 by networks) of 3 tokens, K = 2, chi-square, false alarms 1e-6 each, in one batch."""
    samples = SAMPLES[family]
    model, params = tiny.model(family, vocab_size=VOCAB)
    _, part, part_params = _drafters(family)[drafter]
    cases = [(rule, name, prompt) for rule in SAMPLED for name in SETTINGS for prompt in PROMPTS]
    which = np.repeat([list(SAMPLED).index(rule) for rule, _, _ in cases], samples)
    fields = _as_rows([SETTINGS[name] for _, name, _ in cases])
    out = specjax.generate(
        model, params, part, part_params, jnp.repeat(jnp.array([PROMPTS[case[2]] for case in cases]), samples, 0),
        key=jax.random.key(9), max_new_tokens=LENGTH, stop_tokens=[STOP], processor=_processor,
        sampling=jax.tree.map(lambda x: jnp.repeat(x, samples, 0), fields),
        verifier=_by_row(list(SAMPLED.values()), which), controller=controllers.fixed(2),
    )  # fmt: skip
    for (rule, name, prompt), tokens in zip(cases, np.split(np.asarray(out.tokens), len(cases)), strict=True):
        probs = testing.exact_sequence_probs(
            model, params, PROMPTS[prompt], LENGTH, sampling=SETTINGS[name], stop_tokens=[STOP], processor=_processor
        )
        try:
            testing.assert_same_distribution(testing.count_sequences(tokens, 2, LENGTH, VOCAB), probs)
        except AssertionError as error:
            raise AssertionError(f"{rule}, {name}, {prompt}: {error}") from None


@pytest.mark.parametrize("drafter", range(3), ids=["draft_model", "time-varying", "one-hot"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_as_plain_decoding(family, drafter):
    """Catches a combination that changes a token: at temperature 0 by every verifier, at any temperature by the
    coupled one. 12 tokens, K = 3, every setting, with and without a custom processor."""
    model, params = tiny.model(family, vocab_size=VOCAB)
    _, part, part_params = _drafters(family)[drafter]
    cases = [(name, prompt) for name in SETTINGS for prompt in PROMPTS]
    prompts = jnp.array([PROMPTS[prompt] for _, prompt in cases])
    options = {"max_new_tokens": 12, "processor": _processor, "stop_tokens": [STOP], "key": jax.random.key(3)}
    sampled = _as_rows([SETTINGS[name] for name, _ in cases])
    greedy = sampled._replace(temperature=jnp.zeros(len(cases)))

    wanted = specjax.autoregressive(model, params, prompts, sampling=sampled, **options)
    out = specjax.generate(
        model, params, part, part_params, prompts, sampling=sampled, verifier=verify.coupled(),
        controller=controllers.fixed(3), **options,
    )  # fmt: skip
    assert out.new_tokens() == wanted.new_tokens()

    wanted = specjax.autoregressive(model, params, prompts, sampling=greedy, **options).new_tokens()
    rules = [*SAMPLED.values(), *GREEDY.values()]
    many, which = len(rules), np.repeat(np.arange(len(rules)), len(cases))
    out = specjax.generate(
        model, params, part, part_params, jnp.tile(prompts, (many, 1)), verifier=_by_row(rules, which),
        sampling=jax.tree.map(lambda x: jnp.concatenate([x] * many), greedy), controller=controllers.fixed(3),
        **options,
    )  # fmt: skip
    assert out.new_tokens() == wanted * many


@pytest.mark.parametrize("family", FAMILIES)
def test_models_keep_the_contract(family):
    """Catches a model that verifies other than it decodes, or remembers what was rejected."""
    checked = testing.check_model(*tiny.model(family))
    assert len(checked) == 7


@pytest.mark.parametrize("family", FAMILIES)
def test_drafters_keep_the_contract(family):
    """Catches a drafter that misstates its distribution, or reads its neighbours."""
    model, params = tiny.model(family, vocab_size=VOCAB)
    for name, part, part_params in _drafters(family)[: None if family == "table" else 1]:
        checked = testing.check_drafter(part, part_params, target=model, target_params=params)
        assert len(checked) == 5, name
