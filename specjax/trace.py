"""A generation round by round, as text with probabilities: what the viewer shows, and plain data to make more of.

    chunks = specjax.stream(model, params, drafter, drafter_params, *prompts)
    trace = specjax.trace.collect(chunks, prompts.ids(), tokenizer.decode)
    specjax.viewer.save(trace, "trace.html")

In a notebook a `Trace` shows itself. It is NamedTuples of strings, numbers and lists all the way down: one that you
make yourself, of edited rounds or of another system's, is shown as well.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from specjax import markup, stats
from specjax.stream import Chunk, Drafted, LogProb, Origin
from specjax.types import Stats, Status

Decode: TypeAlias = Callable[[list[int]], str]
Name: TypeAlias = Callable[[int], str | None]
Setting: TypeAlias = str | int | float | None

FORMAT = 1  # of `as_json`
_CONTEXT = 6  # tokens decoded before a token: its spaces depend on them, its characters may begin in them
_PARTIAL = "\ufffd"
_NO_DRAFT = Drafted([], [], [], [], num_emitted=1)


class Kind(enum.StrEnum):
    """What a token was in its round."""

    ACCEPTED = "accepted"  # drafted, and kept
    REJECTED = "rejected"  # drafted, and replaced by the corrected token
    UNUSED = "unused"  # drafted behind a rejected token, off a tree's path, or past the end of the row
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
    target_prob: float | None  # under the law that was verified against: temperature, top-p and the like applied
    model_prob: float | None  # under the target's raw law: temperature 1, nothing applied
    draft_prob: float | None = None  # under the law it was drawn from; None where it was not drafted


class TracedRound(NamedTuple):
    """One draft, and what the target made of it."""

    draft: list[Token]
    target: Token | None  # the corrected or bonus token; None where the row ended on a drafted one
    text: str  # what the round added; a character belongs to the round that completed it

    def emitted(self) -> list[Token]:
        """The tokens that became text."""
        kept = [token for token in self.draft if token.kind == Kind.ACCEPTED]
        return kept if self.target is None else [*kept, self.target]


class TracedRow(NamedTuple):
    """One prompt, its rounds and its end."""

    prompt: str
    start: TracedRound  # what came with the reading of the prompt: no draft, one token; counted nowhere as a round
    rounds: list[TracedRound]
    status: Status

    @property
    def text(self) -> str:
        """What was generated."""
        return self.start.text + "".join(one.text for one in self.rounds)

    def emitted(self) -> list[Token]:
        """The generated tokens in order."""
        return [token for one in (self.start, *self.rounds) for token in one.emitted()]


class Trace(NamedTuple):
    """Some generations, and what they were made with."""

    rows: list[TracedRow]
    settings: dict[str, Setting]  # shown as they are, in this order

    def __repr__(self) -> str:
        return f"Trace of {len(self.rows)} row{'s' * (len(self.rows) != 1)}: {_headline(self.rows)}"

    def __str__(self) -> str:
        return "\n\n".join(row.prompt + row.text for row in self.rows)

    def _repr_html_(self) -> str:
        return markup.document([_passage(row) for row in self.rows])


def collect(
    chunks: Iterable[Chunk],
    prompts: Sequence[Sequence[int]],
    decode: Decode,
    *,
    name: Name | None = None,
    settings: Mapping[str, Setting] | None = None,
) -> Trace:
    """The trace of what `specjax.stream` yields.

    Args:
      chunks: all of them, or the first few.
      prompts: the ids of each row, without padding. Rows beyond them only filled the batch, and are left out.
      decode: ids to text.
      name: what to call a token that has no text of its own, such as a special one.
      settings: to be shown beside it: models, temperature, seconds ...

    >>> import jax, jax.numpy as jnp, specjax
    >>> from specjax import testing, trace
    >>> model = testing.table_model(order=1, vocab_size=8)
    >>> params = testing.random_table(jax.random.key(0), order=1, vocab_size=8)
    >>> draft = specjax.drafters.draft_model(model)
    >>> chunks = specjax.stream(model, params, draft, params, jnp.array([[1, 2]]), max_new_tokens=13)
    >>> trace.collect(chunks, [[1, 2]], lambda ids: "".join("abcdefgh"[id] for id in ids))
    Trace of 1 row: 13 tokens, 2 rounds, 6.00 tokens per round
    """
    growing = [_Growing(list(prompt), decode, name or (lambda _: None)) for prompt in prompts]
    for chunk in chunks:
        for row, one in enumerate(growing):
            one.add(chunk, row)
    return Trace([one.row() for one in growing], dict(settings or {}))


def counts(rows: Sequence[TracedRow]) -> Stats:
    """What `generate` counts, from the rounds of a trace: NumPy arrays, for the functions of `specjax.stats`.

    K is that of the longest draft; the rows are taken for those of one batch.
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
    waits: list[Any] = [_waits(of_all[:count]) for count in rounds]
    return Stats(
        rounds=rounds,
        emitted=emitted,
        drafted=by_position(lambda one: len(one.draft)),
        tested=by_position(lambda one: min(num_accepted(one) + 1, len(one.emitted()), len(one.draft))),
        accepted=by_position(num_accepted),
        by_longest=by_longest,
        resumed=np.array([len(each) for each in waits], np.int32),  # type: ignore[arg-type]
        caught_up=np.array([sum(each) for each in waits], np.int32),  # type: ignore[arg-type]
    )


def _waits(lengths: Sequence[int]) -> list[int]:
    """How many zeros are in a row, wherever something else comes after them."""
    runs = [(is_draft, len(list(run))) for is_draft, run in itertools.groupby(lengths, bool)]
    return [count for is_draft, count in runs[:-1] if not is_draft]


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


class _Growing:
    """A row while chunks come: its ids, and its text as far as characters are complete."""

    def __init__(self, prompt: list[int], decode: Decode, name: Name):
        self._decode, self._name = decode, name
        self._prompt, self._ids = decode(prompt), prompt
        self._rounds: list[TracedRound] = []
        self._status = Status.ACTIVE
        self._settle()

    def add(self, chunk: Chunk, row: int) -> None:
        """What the chunk says of this row."""
        self._status = Status(chunk.status[row])
        emitted = zip(chunk.tokens[row], chunk.log_probs[row], chunk.origins[row], strict=True)
        outside = len(chunk.tokens[row]) - sum(one.num_emitted for one in chunk.rounds[row])
        for drafted in [_NO_DRAFT] * outside + chunk.rounds[row]:
            self._rounds.append(self._round(drafted, list(itertools.islice(emitted, drafted.num_emitted))))

    def row(self) -> TracedRow:
        """All of it; the end of an incomplete character goes to the last round."""
        start, *rounds = self._rounds or [TracedRound([], None, "")]
        *before, last = (start, *rounds)
        rest = self._decode(self._ids[self._start :])[len(self._shown) :]
        start, *rounds = *before, last._replace(text=last.text + rest)
        return TracedRow(self._prompt, start, rounds, self._status)

    def _round(self, drafted: Drafted, emitted: list[tuple[int, LogProb, Origin]]) -> TracedRound:
        before = self._ids[-_CONTEXT:]
        has_next = drafted.num_emitted > len(drafted.accepted)
        draft = []
        for place, (token, target, prob) in enumerate(
            zip(drafted.tokens, drafted.target, drafted.draft_probs, strict=True)
        ):
            kind = Kind.REJECTED if has_next and place == len(drafted.accepted) else Kind.UNUSED
            kind = Kind.ACCEPTED if place in drafted.accepted else kind
            draft.append(self._token(before + drafted.tokens[:place], token, kind, target, prob))
        last = None
        if has_next:
            token, score, origin = emitted[-1]
            kept = [drafted.tokens[place] for place in drafted.accepted]
            last = self._token(before + kept, token, _KINDS[origin], score)
        return TracedRound(draft, last, self._read([token for token, _, _ in emitted]))

    def _token(self, before: list[int], token: int, kind: Kind, target: LogProb, prob: float | None = None) -> Token:
        was, now = self._decode(before), self._decode([*before, token])
        added = _beyond(was, now)
        text = added or (_PARTIAL if now.endswith(_PARTIAL) else self._name(token) or "")
        return Token(token, text, kind, _probability(target.processed), _probability(target.raw), prob)

    def _read(self, ids: list[int]) -> str:
        self._ids = self._ids + ids
        whole = self._decode(self._ids[self._start :])
        complete = whole.rstrip(_PARTIAL)
        added = _beyond(self._shown, complete)
        self._shown = complete
        if complete == whole:
            self._settle()
        return added

    def _settle(self) -> None:
        """Every character is complete: what comes needs the last few tokens only."""
        self._start = max(len(self._ids) - _CONTEXT, 0)
        self._shown = self._decode(self._ids[self._start :])


def _beyond(before: str, text: str) -> str:
    """What `text` has after the part that it begins with in common with `before`: all of that, as a rule."""
    if text.startswith(before):
        return text[len(before) :]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False))
    return text[sum(1 for _ in same) :]


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


def _passage(row: TracedRow) -> markup.Passage:
    # Tokens that hold a part of a character are left out where the last of them shows it whole.
    hides = _PARTIAL not in row.text
    shown = [token for token in row.emitted() if not (hides and token.text.strip(_PARTIAL) == "")]
    return markup.Passage(row.prompt, [(token.text, token.kind, _hint(token)) for token in shown], _headline([row]))


def _hint(token: Token) -> str:
    named = {"target": token.target_prob, "target, raw": token.model_prob, "draft": token.draft_prob}
    return ", ".join([token.kind, *(f"{name} {prob:.4g}" for name, prob in named.items() if prob is not None)])
