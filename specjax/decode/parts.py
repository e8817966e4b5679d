"""Checks of the parts of a generation: each has the right type, and all fit together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from specjax.controllers.buckets import MOST
from specjax.decode.arguments import Checked
from specjax.traced import known
from specjax.types import Controller, Draft, Drafter, Model, Params, Rows, Sampling, Setup, Verifier

_NO_TREES = (
    "this drafter makes trees, and this target reads chains only (its Model says trees=False): use a drafter of "
    "chains, such as drafters.draft_model(...)."
)


def check_kinds(model: Any, drafter: Any = None, verifier: Any = None, controller: Any = None) -> None:
    """Checks the type of every part. Parts are tuples: without this check a wrong one would fail later, unclearly."""
    parts = (
        (
            model,
            Model,
            "model must be a specjax.Model: pass the `.model` of what models.load or adapters.from_nnx returned",
        ),
        (
            drafter,
            Drafter,
            "drafter must be a specjax.Drafter: wrap a draft model as drafters.draft_model(loaded.model)",
        ),
        (verifier, Verifier, "verifier must be a specjax.Verifier: call its maker, as in verify.rejection()"),
        (
            controller,
            Controller,
            "controller must be a specjax.Controller: call its maker, as in controllers.fixed(5) or "
            "controllers.throughput(profile)",
        ),
    )
    for part, kind, wanted in parts:
        if part is not None and not isinstance(part, kind):
            raise ValueError(f"{wanted}; got {type(part).__name__}.")
    if controller is not None:
        _buckets(controller.buckets)


def _buckets(buckets: Any) -> None:
    is_whole = isinstance(buckets, tuple) and all(isinstance(size, int) for size in buckets)
    ascends = is_whole and list(buckets) == sorted(set(buckets)) and buckets
    if not ascends or buckets[0] < 0 or buckets[-1] > MOST:
        raise ValueError(
            "a Controller's buckets must be a tuple of whole numbers that ascend, as in (0, 2, 5); the last is K, in "
            f"0..{MOST} (0 never drafts); got {buckets!r}."
        )


def check_draft_lengths(lengths: Any, batch: int) -> None:
    """Checks the draft lengths that a controller asks for, while tracing."""
    wanted, given = (batch,), jax.eval_shape(lambda: lengths)
    if given.shape != wanted or not jax.numpy.issubdtype(given.dtype, jax.numpy.integer):
        raise ValueError(
            f"a Controller's draft_len must return int32 {list(wanted)}, one number a row; got {given.dtype} "
            f"{list(given.shape)}."
        )


def check_draft(setup: Setup, made: Any) -> None:
    """Checks, while tracing, that a draft has the form that its drafter declares."""
    if not isinstance(made, Draft):
        raise ValueError(f"a Drafter's propose must return (Draft, state), got a {type(made).__name__} for the draft.")
    places, wanted = made.tokens.shape[1], setup.num_nodes
    if places != wanted:
        what = "longest draft K" if setup.drafter.num_nodes is None else "num_nodes(K)"
        raise ValueError(
            f"the drafter's tokens must be int32 [B, N] with N = {wanted}, its {what}; got {places} of a row."
        )
    if made.parents is not None and not setup.model.trees:
        raise ValueError(_NO_TREES)
    if made.probs_at is not None and made.parents is None:
        raise ValueError("a Draft with probs_at needs parents: tokens of a chain have a distribution each.")


def check_verdict(setup: Setup, made: Any) -> None:
    """Checks, while tracing, the path that a verifier of trees returns."""
    if made.path is not None and (setup.drafter.num_nodes is None or made.path.shape[1] != setup.longest):
        raise ValueError(
            f"a Verdict's path must be int32 [B, K] with K = {setup.longest}, for a drafter that says its num_nodes; "
            f"got {list(made.path.shape)}."
        )


def check_updated(before: Any, after: Any) -> None:
    """Checks, while tracing, that a controller's state keeps its form."""
    was, now = _form(lambda: before), _form(lambda: after)
    if was != now:
        where, was, now = _first_difference(was, now)
        raise ValueError(f"a Controller's update must return a state of the form of init's, {was}{where}; got {now}.")


def _form(make: Callable[[], Any]) -> Any:
    """Dtypes and shapes of the state that `make` would return, as messages show them."""
    return jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", jax.eval_shape(make))


def _first_difference(wanted: Any, given: Any) -> tuple[str, Any, Any]:
    """Where two forms first differ, and both forms there; the whole forms if their structures differ."""
    if jax.tree.structure(wanted) != jax.tree.structure(given):
        names = _named(wanted), _named(given)
        return "", *(names if names[0] != names[1] else (wanted, given))
    both = zip(jax.tree_util.tree_flatten_with_path(wanted)[0], jax.tree.leaves(given), strict=True)
    path, own, other = next((path, own, other) for (path, own), other in both if own != other)
    return f" in {jax.tree_util.keystr(path, simple=True)}" if path else "", own, other


def _named(form: Any) -> Any:
    """A NamedTuple by its name, as its fields may fill a screen."""
    return f"a {type(form).__name__}" if hasattr(form, "_fields") else form


def check_processor(rule: Any) -> None:
    """Checks that the caller's own rule is a function that jit can hash."""
    if rule is None:
        return
    if not callable(rule):
        raise ValueError(f"processor must be a function of (logits, tokens, length), got {type(rule).__name__}.")
    try:
        hash(rule)
    except TypeError:
        raise ValueError(
            f"processor must be hashable, and {type(rule).__name__} is not: pass a plain function, defined once."
        ) from None


def check_fit(setup: Setup, sampling: Sampling) -> None:
    """Checks that the parts of a generation fit each other."""
    model, drafter, verifier = setup.model, setup.drafter, setup.verifier
    if drafter.vocab_size is not None and drafter.vocab_size != model.vocab_size:
        raise ValueError(
            f"draft and target vocabularies differ: the drafter has {drafter.vocab_size} ids, the target "
            f"{model.vocab_size}. Use a draft model trained with the target's tokenizer."
        )
    if drafter.num_nodes is not None and not model.trees:
        raise ValueError(_NO_TREES)
    if drafter.hidden_layers and not model.hidden:
        raise ValueError(
            f"this drafter reads the target's hidden states of layers {drafter.hidden_layers}, and this target gives "
            "none (an adapted module's stay inside it). Use a drafter that needs none, drafters.draft_model(...)."
        )
    temperature = known(sampling.temperature)
    if verifier.greedy_only and temperature is not None and (temperature > 0).any():
        raise ValueError(
            f"this verifier is for temperature 0 only, got temperature {temperature.max()}. "
            "Use specjax.verify.rejection() (--verifier rejection), which is exact at every temperature."
        )


def check_drafter_state(setup: Setup, params: Params, open_rows: Callable[[], Rows], inputs: Any, state: Any) -> None:
    """Checks the drafter state that the caller passes on from an earlier call."""
    if state is None:
        return
    drafter = setup.drafter
    learnt = drafter.learnt
    if learnt is None:
        raise ValueError("this drafter learns nothing that outlives a call: leave drafter_state out.")

    def fresh() -> Any:
        rows, sizes = open_rows(), {"slots": setup.slots, "longest": setup.longest}
        begun = drafter.init(params.drafter, rows.lengths.shape[0], **sizes, inputs=inputs, learnt=None)
        return learnt(begun, rows)

    wanted, given = _form(fresh), _form(lambda: state)
    if wanted != given:
        where, wanted, given = _first_difference(wanted, given)
        raise ValueError(
            f"drafter_state does not fit: this drafter's is {wanted}{where}, got {given}. Pass the field drafter_state "
            "of a Generation by the same drafter, or None to start afresh."
        )


def check_controller_state(controller: Controller, state: Any, request: Checked) -> None:
    """Checks the controller state that the caller passes on: of the same controller, and for as many rows."""
    if state is None:
        return
    batch = request.arrays.prompts.shape[0]
    wanted, given = _form(lambda: controller.init(batch)), _form(lambda: state)
    if wanted != given:
        where, wanted, given = _first_difference(wanted, given)
        raise ValueError(
            f"controller_state does not fit: for {batch} rows this controller's state is {wanted}{where}, got {given}. "
            "Pass the field controller_state of a Generation by the same controller with as many rows, or None to "
            "start afresh."
        )
