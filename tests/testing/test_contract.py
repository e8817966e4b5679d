"""Every drafter with every verifier, processor and model: the output is the target's (same tokens or distribution)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from made_up import by_plan, profile

import specjax
from specjax import Sampling, controllers, drafters, testing, verify
from specjax.testing import Adversary, constant_drafter, time_varying_drafter
from specjax.types import Verdict, Verifier

VOCAB, LENGTH, STOP = 4, 3, 3  # small enough to enumerate
WIDE = 13
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
    is_forbidden = (jnp.arange(logits.shape[-1]) == last) & (last == tokens[length - 2]) & (tokens[0] == 1)
    return jnp.where(is_forbidden, -jnp.inf, logits)


FAMILIES = ["table", "llama", "gpt2"]
SAMPLES = {"table": 4000, "llama": 500, "gpt2": 500}
_DRAFT = {  # a family, and what its models need to be of one layer: networks draft for the other kind
    "table": ("table", {}),
    "llama": ("gpt2", {"n_layer": 1}),
    "gpt2": ("llama", {"num_hidden_layers": 1}),
}
CONTROLLERS = {
    "fixed": controllers.fixed(3),
    "additive": controllers.additive(3, 1),
    "confidence": controllers.confidence(0.5, 3),
    "throughput": controllers.throughput(profile()),
    "sometimes": by_plan([0, 0, 3, 1, 0, 2, 0, 0, 0, 0, 0, 3]),
}


def _drafters(family, vocab_size=VOCAB):
    kind, changes = _DRAFT[family]
    model, params = tiny.model(kind, seed=1, vocab_size=vocab_size, **changes)
    tables = testing.random_table(jax.random.key(4), order=2, vocab_size=vocab_size, sharpness=2.0)
    varying = jnp.stack([tables, -tables, 0 * tables])
    return [
        Adversary("draft_model", drafters.draft_model(model), params),
        Adversary("time-varying", time_varying_drafter(vocab_size), varying),
        Adversary("one-hot", constant_drafter(0), ()),
    ]


def _by_row(rules, which, coupled=False):
    """One verifier of many: row b is judged by rules[which[b]]. Rows never meet, so this is all of them at once."""

    def run(context, draft, target):
        verdicts = [rule.verify(context, draft, target) for rule in rules]
        return Verdict(*(
            jnp.stack([getattr(verdict, name) for verdict in verdicts])[which, jnp.arange(len(which))]
            for name in ("num_accepted", "next_token")
        ))  # fmt: skip

    return Verifier(run, coupled=coupled)


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


@pytest.mark.parametrize(
    ("family", "drafter", "controller"),
    [(family, drafter, "fixed") for family in FAMILIES for drafter in range(3)]
    + [(family, 0, name) for family in ("table", "llama") for name in CONTROLLERS if name != "fixed"]
    + [("gpt2", 0, "sometimes")],
)
def test_the_same_tokens_as_plain_decoding(family, drafter, controller):
    """Catches any loss of position, cache or token between rounds, and a bucket that verifies another draft than was
    made: at temperature 0 with every verifier, at any temperature with the coupled one. Every setting, with and without
    a custom processor, ragged prompts, limits that differ by row."""
    model, params = tiny.model(family, vocab_size=WIDE)
    _, part, part_params = _drafters(family, WIDE)[drafter]
    cases = [(name, prompt) for name in SETTINGS for prompt in PROMPTS]
    rules = [verify.coupled(), *SAMPLED.values(), *GREEDY.values()]
    many, count = len(rules), len(cases)
    place, rule = jnp.tile(jnp.arange(count), many), np.repeat(np.arange(many), count)
    sampling = _as_rows([SETTINGS[name] for name, _ in cases] * many)
    sampling = sampling._replace(
        temperature=jnp.where(rule == 0, sampling.temperature, 0.0),
        logit_bias=jnp.pad(sampling.logit_bias, ((0, 0), (0, WIDE - VOCAB))),
    )
    prompts = jnp.array([[*PROMPTS[prompt], 2] for _, prompt in cases] * many)
    options = {
        "prompt_lengths": 2 + place % 2, "max_new_tokens": 17 + 6 * place, "capacity": 64, "sampling": sampling,
        "key": jax.random.key(3), "seeds": place, "stop_tokens": [WIDE - 2], "processor": _processor,
    }  # fmt: skip
    plain = specjax.autoregressive(model, params, prompts, **options)
    out = specjax.generate(
        model,
        params,
        part,
        part_params,
        prompts,
        verifier=_by_row(rules, rule, coupled=True),  # at temperature 0 the noise of drafts is not used
        controller=CONTROLLERS[controller],
        **options,
    )
    assert out.new_tokens() == plain.new_tokens()
    assert (out.tokens == plain.tokens).all()
    assert (out.status == plain.status).all()
    np.testing.assert_allclose(out.log_probs.raw, plain.log_probs.raw, atol=1e-4)
    assert out.stats.rounds.max() > 8  # the texts are not that short


@pytest.mark.parametrize(
    ("family", "draft_len", "rule"), [("table", 1, "greedy"), ("table", 8, "greedy"), ("llama", 4, "rejection")]
)
def test_greedy_speculation_is_greedy_decoding(family, draft_len, rule):
    """Catches what only the programs of most users have: settings that are None, one verifier, other draft lengths.
    Ragged prompts, limits that differ by row."""
    model, params = tiny.model(family, vocab_size=WIDE)
    _, part, part_params = _drafters(family, WIDE)[0]
    prompts, lengths = jnp.array([[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 0, 0]]), jnp.array([4, 1, 2])
    limits = jnp.array([20, 31, 7])
    plain = specjax.autoregressive(model, params, prompts, lengths, max_new_tokens=limits)
    out = specjax.generate(
        model, params, part, part_params, prompts, lengths, max_new_tokens=limits,
        controller=controllers.fixed(draft_len), verifier=getattr(verify, rule)(),
    )  # fmt: skip
    assert out.new_tokens() == plain.new_tokens()
    assert [len(row) for row in out.new_tokens()] == limits.tolist()
    assert (out.tokens == plain.tokens).all()


@pytest.mark.parametrize(
    ("family", "rule", "controller", "sampling"),
    [
        ("llama", "greedy", "fixed", Sampling()),
        ("llama", "block", "fixed", Sampling(0.9, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.2)),
        ("table", "rejection", "additive", Sampling(0.9)),
        ("table", "rejection", "confidence", Sampling(0.9)),
        ("table", "rejection", "sometimes", Sampling(0.9)),
    ],
)
def test_a_row_is_what_it_is_alone(family, rule, controller, sampling):
    """Known bug 3 and shared noise: a row's output must not depend on its batch, its place, the padding, the capacity
    or the draft lengths of others. The rows of the batch end at different times."""
    model, params = tiny.model(family, vocab_size=WIDE)
    _, part, part_params = _drafters(family, WIDE)[0]
    prompts, lengths = jnp.array([[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 0, 0]]), jnp.array([4, 1, 2])
    seeds, limits = jnp.array([70, 71, 72]), jnp.array([23, 9, 18])
    options = {
        "sampling": sampling, "verifier": getattr(verify, rule)(), "controller": CONTROLLERS[controller],
    }  # fmt: skip

    def run(prompts, rows, **more):
        return specjax.generate(
            model, params, part, part_params, prompts[rows], lengths[rows], max_new_tokens=limits[rows],
            seeds=seeds[rows], **options, **more,
        ).new_tokens()  # fmt: skip

    together = run(prompts, jnp.arange(3))
    shuffled = run(prompts, jnp.array([2, 0, 1]), capacity=70)
    assert [shuffled[1], shuffled[2], shuffled[0]] == together
    wide = jnp.pad(prompts, ((0, 0), (0, 5)), constant_values=12)
    for row in range(3):
        assert run(wide, jnp.array([row])) == [together[row]]


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
