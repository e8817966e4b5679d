"""A generation round by round, as text with probabilities: for the viewer, and as plain data for other uses.

    chunks = specjax.stream(model, params, drafter, drafter_params, *prompts)
    trace = specjax.trace.collect(chunks, prompts.ids(), tokenizer.decode)
    specjax.viewer.save(trace, "trace.html")

In a notebook a `Trace` shows itself. It consists of NamedTuples, strings, numbers and lists only: you can also show a
trace that you make yourself, from edited rounds or from those of another system.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from specjax import stats
from specjax.decode.stream import Chunk, Drafted, LogProb, Origin
from specjax.detokenize.pieces import CONTEXT, PARTIAL, Codec, Decode, beyond, codec_for, completed_by, split
from specjax.detokenize.stop_strings import StopFinder, stop_strings
from specjax.types import Stats, Status
from specjax.viewer import html

Name: TypeAlias = Callable[[int], str | None]
Setting: TypeAlias = str | int | float | None

FORMAT = 1  # of `as_json`
_NO_DRAFT = Drafted([], [], [], [], num_emitted=1)


class Kind(enum.StrEnum):
    """What a token was in its round."""

    ACCEPTED = "accepted"  # drafted, and kept
    REJECTED = "rejected"  # drafted, and replaced by the corrected token
    UNUSED = "unused"  # drafted after a rejected token, off a tree's path, or past the end of the row
    CORRECTED = "corrected"  # the target's, in place of a rejected token
    BONUS = "bonus"  # the target's, after a draft that was kept whole
    FIRST = "first"  # the target's, from the prompt's own forward pass


_KINDS = {
    Origin.PROMPT_END: Kind.FIRST,
    Origin.ACCEPTED: Kind.ACCEPTED,
    Origin.CORRECTED: Kind.CORRECTED,
    Origin.BONUS: Kind.BONUS,
}


class Token(NamedTuple):
    """One token; probabilities are in 0..1, None where there is none."""

    id: int
    text: str  # what it adds to the text before it; U+FFFD while it leaves a character incomplete
    kind: Kind
    target_prob: float | None  # under the distribution used to verify: temperature, top-p and the like applied
    model_prob: float | None  # under the target's raw distribution: temperature 1, nothing applied
    draft_prob: float | None = None  # under the distribution it was drawn from; None where it was not drafted


class TracedRound(NamedTuple):
    """One draft, and the target's verdict on it."""

    draft: list[Token]
    target: Token | None  # the corrected or bonus token; None where the row ended on a draft token
    text: str  # what the round added; a character belongs to the round that completed it

    def emitted(self) -> list[Token]:
        """The tokens that became text."""
        kept = [token for token in self.draft if token.kind == Kind.ACCEPTED]
        return kept if self.target is None else [*kept, self.target]


class TracedRow(NamedTuple):
    """One prompt, its rounds and its end."""

    prompt: str
    start: TracedRound  # from reading the prompt: no draft, one token; not counted as a round
    rounds: list[TracedRound]
    status: Status

    @property
    def text(self) -> str:
        """The generated text."""
        return self.start.text + "".join(one.text for one in self.rounds)

    def emitted(self) -> list[Token]:
        """The generated tokens in order."""
        return [token for one in (self.start, *self.rounds) for token in one.emitted()]


class Trace(NamedTuple):
    """Some generations, and their settings."""

    rows: list[TracedRow]
    settings: dict[str, Setting]  # shown as they are, in this order

    def __repr__(self) -> str:
        return f"Trace of {len(self.rows)} row{'s' * (len(self.rows) != 1)}: {_headline(self.rows)}"

    def __str__(self) -> str:
        return "\n\n".join(row.prompt + row.text for row in self.rows)

    def _repr_html_(self) -> str:
        return html.document([_passage(row) for row in self.rows])


def collect(
    chunks: Iterable[Chunk],
    prompts: Sequence[Sequence[int]],
    decode: Decode,
    *,
    name: Name | None = None,
    settings: Mapping[str, Setting] | None = None,
    stop: str | Sequence[str] = (),
) -> Trace:
    """The trace of what `specjax.stream` yields.

    Args:
      chunks: all of them, or the first few.
      prompts: the ids of each row, without padding. Rows beyond them only filled the batch, and are left out.
      decode: ids to text.
      name: what to call a token that has no text of its own, such as a special one.
      settings: to be shown beside it: models, temperature, seconds ...
      stop: strings that end a row: its text ends before the first one, its tokens with the one that completes it.

    Raises:
      ValueError: an empty stop string.

    >>> import jax, jax.numpy as jnp, specjax
    >>> from specjax import testing, trace
    >>> model = testing.table_model(order=1, vocab_size=8)
    >>> params = testing.random_table(jax.random.key(0), order=1, vocab_size=8)
    >>> draft = specjax.drafters.draft_model(model)
    >>> chunks = specjax.stream(model, params, draft, params, jnp.array([[1, 2]]), max_new_tokens=13)
    >>> trace.collect(chunks, [[1, 2]], lambda ids: "".join("abcdefgh"[id] for id in ids))
    Trace of 1 row: 13 tokens, 2 rounds, 6.00 tokens per round
    """
    strings, naming = stop_strings(stop), name or (lambda _: None)
    rounds: list[list[_RoundRecord]] = [[] for _ in prompts]
    status = [Status.ACTIVE] * len(prompts)
    for chunk in chunks:
        for row, known in enumerate(rounds):
            known += _round_records(chunk, row)
            status[row] = Status(chunk.status[row])
    told = zip(prompts, rounds, status, strict=True)
    rows = [_row(list(prompt), known, end, decode, naming, strings) for prompt, known, end in told]
    return Trace(rows, dict(settings or {}))


def counts(rows: Sequence[TracedRow]) -> Stats:
    """What `generate` counts, from the rounds of a trace: NumPy arrays, for the functions of `specjax.stats`.

    K is the length of the longest draft; all rows count as rows of one batch.
    """
    longest = max((len(one.draft) for row in rows for one in row.rounds), default=0)
    together = itertools.zip_longest(*(row.rounds for row in rows))
    of_all = [max((len(one.draft) for one in each if one), default=0) for each in together]

    def by_position(length: Callable[[TracedRound], int]) -> Any:
        found = [[sum(length(one) > place for one in row.rounds) for place in range(longest)] for row in rows]
        return np.array(found, np.int32).reshape(len(rows), longest)

    def num_accepted(one: TracedRound) -> int:
        return len(one.emitted()) - (one.target is not None)

    rounds: Any = np.array([len(row.rounds) for row in rows], np.int32)
    emitted: Any = np.array([sum(len(one.emitted()) for one in row.rounds) for row in rows], np.int32)
    by_longest: Any = np.zeros((len(rows), longest + 1), np.int32)
    for row, count in enumerate(rounds):
        np.add.at(by_longest[row], of_all[:count], 1)
    return Stats(
        rounds=rounds,
        emitted=emitted,
        drafted=by_position(lambda one: len(one.draft)),
        tested=by_position(lambda one: min(num_accepted(one) + 1, len(one.emitted()), len(one.draft))),
        accepted=by_position(num_accepted),
        by_longest=by_longest,
        drafted_by=by_position(lambda one: len(one.draft)).sum(1, keepdims=True),
        accepted_by=by_position(num_accepted).sum(1, keepdims=True),
        switches=np.array([_switches(of_all[:count]) for count in rounds], np.int32),  # type: ignore[arg-type]
    )


def _switches(lengths: Sequence[int]) -> int:
    """Changes between zeros and other lengths; the start counts as a zero."""
    kinds = [False, *map(bool, lengths)]
    return sum(before != after for before, after in itertools.pairwise(kinds))


def as_json(trace: Trace) -> dict[str, Any]:
    """The trace as plain data, with its totals; null where there is no number.

    `{"format", "settings", "totals", "rows": [{"prompt", "text", "status", "ended", "totals", "start", "rounds"}]}`,
    where a round is `{"draft": [token], "target": token, "text"}` and a token has the fields of `Token`.
    """
    rows = [
        {
            "prompt": row.prompt,
            "text": row.text,
            "status": row.status.name.lower(),
            "ended": row.status.describe(),
            "totals": _totals([row]),
            "start": _round_as_json(row.start),
            "rounds": [_round_as_json(one) for one in row.rounds],
        }
        for row in trace.rows
    ]
    return {"format": FORMAT, "settings": dict(trace.settings), "totals": _totals(trace.rows), "rows": rows}


class _RoundRecord(NamedTuple):
    """One round of a row, as chunks report it."""

    drafted: Drafted
    emitted: list[tuple[int, LogProb, Origin]]

    def ids(self) -> list[int]:
        return [token for token, _, _ in self.emitted]


def _round_records(chunk: Chunk, row: int) -> Iterator[_RoundRecord]:
    emitted = zip(chunk.tokens[row], chunk.log_probs[row], chunk.origins[row], strict=True)
    outside = len(chunk.tokens[row]) - sum(one.num_emitted for one in chunk.rounds[row])
    for drafted in [_NO_DRAFT] * outside + chunk.rounds[row]:
        yield _RoundRecord(drafted, list(itertools.islice(emitted, drafted.num_emitted)))


def _row(
    prompt: list[int], known: list[_RoundRecord], status: Status, decode: Decode, name: Name, stop: Sequence[str]
) -> TracedRow:
    """A row, made when all its tokens are known: only then is it known which text each token completed."""
    emitted = [token for one in known for token in one.ids()]
    codec, finder = codec_for(decode, prompt + emitted), StopFinder(stop)
    texts = split(codec, prompt, emitted)
    shown = [*finder.feed(texts), *finder.flush()]
    before = [token for token in prompt if not codec.is_silent(token)]
    rounds: list[TracedRound] = []
    place = 0
    for one in known:
        if finder.found and place == len(shown):
            break
        end = place + len(one.emitted)
        made = _round(one, texts[place:end], len(shown[place:end]), before[-CONTEXT:], codec, name)
        rounds.append(made._replace(text="".join(shown[place:end])))
        before += [token for token in one.ids() if not codec.is_silent(token)]
        place = end
    start, *rounds = rounds or [TracedRound([], None, "")]
    return TracedRow(decode(prompt), start, rounds, Status.STOPPED if finder.found else status)


def _round(
    one: _RoundRecord, texts: list[str], num_kept: int, before: list[int], codec: Codec, name: Name
) -> TracedRound:
    """A round and its tokens' texts. A stop string may end the row after `num_kept` of the tokens that it emitted."""
    drafted, emitted = one
    draft = []
    for place, (token, target, prob) in enumerate(
        zip(drafted.tokens, drafted.target, drafted.draft_probs, strict=True)
    ):
        text, kind = "", Kind.UNUSED
        if place in drafted.accepted[:num_kept]:
            text, kind = texts[drafted.accepted.index(place)], Kind.ACCEPTED
        elif place == len(drafted.accepted) < len(emitted) == num_kept:
            kind = Kind.REJECTED
        text = text or _text([*before, *drafted.tokens[:place]], token, codec, name)
        draft.append(_token(token, text, kind, target, prob))
    last = None
    if len(drafted.accepted) < len(emitted) == num_kept:
        token, score, origin = emitted[-1]
        kept = [drafted.tokens[place] for place in drafted.accepted]
        last = _token(token, texts[-1] or _text([*before, *kept], token, codec, name), _KINDS[origin], score)
    return TracedRound(draft, last, "".join(texts))


def _token(token: int, text: str, kind: Kind, target: LogProb, prob: float | None = None) -> Token:
    return Token(token, text, kind, _probability(target.processed), _probability(target.raw), prob)


def _text(before: list[int], token: int, codec: Codec, name: Name) -> str:
    """What a token adds to those before it, or U+FFFD for a part of a character, or its name where it has no text."""
    if codec.is_silent(token):
        return name(token) or ""
    if token in codec.byte_tokens:
        return completed_by(codec, before, token)
    was, now = codec.decode(before), codec.decode([*before, token])
    return beyond(was, now) or (PARTIAL if now.endswith(PARTIAL) else name(token) or "")


def _probability(log_prob: float) -> float | None:
    return min(math.exp(log_prob), 1.0) if log_prob < math.inf else None  # NaN is not below anything


def _totals(rows: Sequence[TracedRow]) -> dict[str, Any]:
    found = counts(rows)
    return {
        "tokens": sum(len(row.emitted()) for row in rows),
        "rounds": int(found.rounds.sum()),
        "tokens_per_round": _number(stats.tokens_per_round(found)),
        "drafted": found.drafted.sum(0).tolist(),
        "tested": found.tested.sum(0).tolist(),
        "accepted": found.accepted.sum(0).tolist(),
        "acceptance_rate": _number(stats.acceptance_rate(found)),
        "acceptance_by_position": [_number(share) for share in stats.acceptance_by_position(found).tolist()],
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _round_as_json(one: TracedRound) -> dict[str, Any]:
    target = None if one.target is None else one.target._asdict()
    return {"draft": [token._asdict() for token in one.draft], "target": target, "text": one.text}


def _headline(rows: Sequence[TracedRow]) -> str:
    found = counts(rows)
    parts = [f"{sum(len(row.emitted()) for row in rows)} tokens", f"{int(found.rounds.sum())} rounds"]
    per_round = stats.tokens_per_round(found)
    return ", ".join(parts if math.isnan(per_round) else [*parts, f"{per_round:.2f} tokens per round"])


def _passage(row: TracedRow) -> html.Passage:
    shown, rest = [], row.text
    for token in row.emitted():
        # Tokens that hold a part of a character are left out where the last of them shows it whole.
        if rest.startswith(token.text) or token.text.strip(PARTIAL):
            shown.append((token.text, token.kind, _hint(token)))
            rest = rest.removeprefix(token.text)
    return html.Passage(row.prompt, shown, _headline([row]))


def _hint(token: Token) -> str:
    named = {"target": token.target_prob, "target, raw": token.model_prob, "draft": token.draft_prob}
    return ", ".join([token.kind, *(f"{name} {prob:.4g}" for name, prob in named.items() if prob is not None)])
