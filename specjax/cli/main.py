"""The command line: `specjax generate`, `specjax bench`, `specjax compile` and `specjax doctor`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import jax
import typer

from specjax import Sampling, __version__, viewer
from specjax.cli import bench as speed
from specjax.cli import bench_display, comparison, exactness, interrupts, options, terminal
from specjax.cli import generate as generation
from specjax.cli import plot as picture
from specjax.cli.choose_controller import Policy
from specjax.cli.display import Display, as_json, findings_as_json
from specjax.cli.doctor import display as doctor_display
from specjax.cli.doctor import environment, problems, self_check
from specjax.cli.load_pair import in_int8, load_pair
from specjax.cli.options import (
    EXACTNESS,
    INT32,
    LONGEST_DRAFT,
    SPEED,
    TOKENS,
    Cache,
    Check,
    Draft,
    Dtype,
    Json,
    Model,
    Part,
    Rule,
    Tokenizer,
    Verbose,
)
from specjax.detokenize.stop_strings import stop_strings

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def main() -> None:
    """Entry point: bad input ends with a message and status 2, Ctrl-C with status 130; no traceback for either."""
    terminal.run(lambda: app(prog_name="specjax"))  # `python -m` would complete and explain another command


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    """Exact speculative decoding for JAX models."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; - reads standard input.")] = None,
    model: Model = None,
    draft: Draft = None,
    tokenizer: Tokenizer = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=TOKENS, help="Tokens to generate per prompt.")] = 128,
    draft_len: Annotated[int, typer.Option(min=1, max=LONGEST_DRAFT, help="K: tokens drafted per round, at most.")] = 5,
    controller: Annotated[
        Policy, typer.Option(help="Who chooses how many, up to K; throughput measures this machine first.")
    ] = Policy.fixed,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="In (0, 1]; 1 keeps all.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, max=INT32, help="0 keeps all.")] = 0,
    min_p: Annotated[float, typer.Option(help="In [0, 1); 0 keeps all.")] = 0.0,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 0; 1 is none. For tokens of the prompt and the text.")
    ] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Taken off every token generated before.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="The same, for each time it was generated.")] = None,
    min_new_tokens: Annotated[int | None, typer.Option(min=0, max=INT32, help="No end of text before as many.")] = None,
    stop: options.Stop = [],  # noqa: B006
    special: options.Special = False,
    verifier: Annotated[Rule, typer.Option(help="How draft tokens are judged; lossy ones change the distribution.")] = (
        Rule.rejection
    ),
    seed: Annotated[int, typer.Option(min=-INT32 - 1, max=INT32, help="Same seed, same text.")] = 0,
    dtype: Dtype = None,
    prompt_file: options.PromptFile = None,
    batch: Annotated[int, typer.Option(min=1, max=INT32, help="Prompts generated together.")] = 8,
    trace: options.Trace = None,
    json_output: Json = False,
    baseline: Annotated[bool, typer.Option(help="Measure plain decoding too.")] = True,
    cache: Cache = True,
    verbose: Verbose = 0,
) -> None:
    """Continue a text, and say what speculation brought.

    Tokens are coloured by origin on a terminal; a pipe gets plain text. The summary goes to standard error. Status 1 if
    no prompt came to an end that was asked for.
    """
    texts = _prompts(prompt, prompt_file)
    keep = None if trace is None else viewer.writer(trace)
    environment.quiet_platform()
    if cache:
        environment.keep_programs()
    task = generation.Task(
        model=model, draft=draft, tokenizer=tokenizer, dtype=dtype, draft_len=draft_len, controller=controller,
        max_new_tokens=max_new_tokens, kept_in=_profiles(cache),
        sampling=Sampling(
            temperature, top_k, top_p, min_p, repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, min_new_tokens=min_new_tokens,
        ),
        verifier=verifier.name, seed=seed, batch=batch, baseline=baseline,
        stop=stop_strings(stop), special=special,
    )  # fmt: skip
    display = Display(plain=json_output or not sys.stdout.isatty(), silent=json_output, verbose=verbose)
    interrupts.watch(lambda: display.is_busy)
    summary = generation.run(task, texts, display, keep)
    if json_output:
        typer.echo(json.dumps(as_json(summary)))
    else:
        display.summary(summary)
        if trace is not None:
            typer.echo(f"trace: {trace}", err=True)
    if summary.interrupted:
        interrupts.leave("")
    if summary.failed:
        raise typer.Exit(1)


@app.command()
def bench(
    verify: Annotated[
        Check | None, typer.Option(help="Verify this on this machine, in place of measuring speed.")
    ] = None,
    model: Model = None,
    draft: Draft = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    int8: Annotated[list[Part], typer.Option(help="Keep its matrices in int8; may be given for both.")] = [],  # noqa: B006
    draft_len: Annotated[
        list[int], typer.Option(min=1, max=LONGEST_DRAFT, help="K; may be given several times.", rich_help_panel=SPEED)
    ] = [5],  # noqa: B006
    controller: Annotated[
        list[Policy],
        typer.Option(
            help="Measure it beside each K, with the largest; may be given several times.", rich_help_panel=SPEED
        ),
    ] = [],  # noqa: B006
    batch: Annotated[
        list[int],
        typer.Option(min=1, max=INT32, help="Rows at once; may be given several times.", rich_help_panel=SPEED),
    ] = [1],  # noqa: B006
    plot: options.Plot = None,
    prompts: Annotated[int, typer.Option(min=1, max=INT32, help="Prompts in all.", rich_help_panel=SPEED)] = 8,
    context: Annotated[int, typer.Option(min=1, max=TOKENS, help="Tokens of each prompt.", rich_help_panel=SPEED)] = 64,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=TOKENS, help="Tokens to generate per row.", rich_help_panel=SPEED)
    ] = 128,
    repeats: Annotated[
        int, typer.Option(min=1, max=INT32, help="Paired repetitions; medians are shown.", rich_help_panel=SPEED)
    ] = 5,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.", rich_help_panel=SPEED)] = 0.0,
    samples: Annotated[
        int, typer.Option(min=1000, max=INT32, help="Sequences of each chi-square test.", rich_help_panel=EXACTNESS)
    ] = 20_000,
    json_output: Json = False,
    cache: Cache = True,
    verbose: Verbose = 0,
) -> None:
    """Measure on this machine what speculation brings, beside what the machine allows at most.

    With --verify exactness, check instead that speculation changes nothing; status 1 if it does: verifiers against
    distributions that can be enumerated, the contracts of both models and of the drafter, then speculation against
    plain decoding, token for token, where near-ties that bfloat16 turns the other way are counted.
    """
    if plot is not None:
        picture.check(plot)
    environment.quiet_platform()
    if cache:
        environment.keep_programs()
    display = Display(plain=False, silent=json_output, verbose=verbose)
    interrupts.watch(lambda: display.is_busy)
    with display.busy("loading the models"):
        pair = in_int8(load_pair(model, draft, tokenizer, dtype), int8)
    if verify is None:
        chosen = tuple(policy for policy in controller if policy is not Policy.fixed)
        found = []
        for rows in batch:
            setting = comparison.Setting(
                tuple(draft_len), chosen, rows, prompts, context, max_new_tokens, repeats, temperature
            )
            found.append(speed.measure(pair, setting, display.busy, kept_in=_profiles(cache)))
            if not json_output:
                display.speed(found[-1])
        if json_output:
            typer.echo(json.dumps(bench_display.as_json(found)))
        if plot is not None:
            picture.save(found, plot)
            typer.echo(f"plot: {plot}", err=True)
        return
    findings = []
    for name, run in exactness.suite(pair, samples):
        with display.busy(name):
            findings.append(run())
        if not json_output:
            display.finding(findings[-1])
    passed = all(finding.passed for finding in findings)
    if json_output:
        typer.echo(json.dumps(findings_as_json(findings, pair)))
    else:
        display.verdict(findings, pair)
    if not passed:
        raise typer.Exit(1)


@app.command("compile")
def plan_pod(
    model: Annotated[
        str, typer.Option(help="Target: llama-8b and the like, target (shipped), a folder, a config.json or a hub id.")
    ],
    draft: Annotated[str, typer.Option(help="Draft model, of the same vocabulary; draft is the shipped one.")],
    topology: Annotated[str, typer.Option(help="v5e:2x2, v5p:2x2x2, v6e:4x4 ...: up to 256 chips.")],
    batch: Annotated[int, typer.Option(min=1, max=INT32, help="Rows.")] = 8,
    capacity: Annotated[int, typer.Option(min=1, max=TOKENS, help="Tokens a row may hold, prompt included.")] = 4096,
    draft_len: Annotated[int, typer.Option(min=1, max=LONGEST_DRAFT, help="K: tokens drafted per round.")] = 4,
    mesh: Annotated[
        str | None, typer.Option(help="data=1,model=8,sub=2. Default: all chips for the model.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of parameters and caches.")] = "bfloat16",
    prompt_width: Annotated[int, typer.Option(min=1, max=TOKENS, help="Of the padded prompts.")] = 128,
    prefill: Annotated[bool, typer.Option(help="Compile the reading of prompts too.")] = True,
    json_output: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Plan a TPU pod before you rent it: compile the whole generation for it, with no TPU at hand.

    Says whether it fits, what the compiler thinks a round of speculation and a plain step cost, and what the chips tell
    each other; takes minutes. Status 1 if it does not fit.
    """
    from specjax import aot
    from specjax.aot import shapes
    from specjax.cli import plan_display

    for name, value in aot.ENVIRONMENT.items():  # before libtpu is loaded
        os.environ.setdefault(name, value)
    if not jax.config.values["jax_platforms"]:
        jax.config.update("jax_platforms", "cpu")
    display = Display(plain=False, silent=json_output, verbose=verbose)
    interrupts.watch(lambda: display.is_busy)
    target, drafting = shapes.shaped(model), shapes.shaped(draft)
    with display.busy(f"compiling for {topology}, minutes for a large model"):
        found = aot.plan(
            target, drafting, topology, batch=batch, capacity=capacity, draft_len=draft_len, prompt_width=prompt_width,
            dtype=dtype, axes=_axes(mesh), prefill=prefill,
        )  # fmt: skip
    if json_output:
        typer.echo(json.dumps(plan_display.as_json(found)))
    else:
        display.show(plan_display.tables(found))
    if not found.fits:
        raise typer.Exit(1)


@app.command("doctor")
def examine(
    check: Annotated[bool, typer.Option(help="Run the self-check.")] = True,
    json_output: Json = False,
    cache: Cache = True,
    verbose: Verbose = 0,
) -> None:
    """Say what is installed here, what is wrong with it, and whether speculation is exact and pays on this machine.

    The self-check takes about a minute the first time, most of it compiling, and begins nothing new after 90 seconds:
    a busy machine is told what was left out. Status 1 if something does not work or is not exact; slow is no failure.
    """
    display = Display(plain=False, silent=json_output, verbose=verbose)
    interrupts.watch(lambda: display.is_busy)
    with display.busy("looking for devices"):
        found = environment.look()
    result = problems.Report(found, problems.problems(found), None)
    if not json_output:
        display.show([doctor_display.facts(found), *doctor_display.problems(result.problems)])
    if check and result.is_healthy:
        if cache:
            environment.keep_programs()
        with display.busy("loading the models"):
            pair = load_pair(None, None, None, None)
        result = result._replace(check=self_check.run(pair, display.busy))
    if json_output:
        typer.echo(json.dumps(doctor_display.as_json(result)))
    elif check:
        display.show(doctor_display.result(result.check))
    if not result.is_healthy:
        raise typer.Exit(1)


def _profiles(cache: bool) -> Path | None:
    """Where profiles of this machine are kept."""
    folder = environment.usable_cache_folder() if cache else None
    return None if folder is None else folder.parent / "profiles"


def _axes(mesh: str | None) -> dict[str, int] | None:
    """ "data=1,model=4" as a dict."""
    if mesh is None:
        return None
    pairs = [part.split("=") for part in mesh.split(",")]
    if any(len(pair) != 2 or not pair[1].isdecimal() for pair in pairs):
        raise ValueError(f"--mesh {mesh}: expected axes and their sizes, as in data=1,model=4.")
    return {name: int(size) for name, size in pairs}


def _prompts(prompt: str | None, prompt_file: Path | None) -> list[str]:
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give a PROMPT or --prompt-file, one of the two.")
    if prompt_file is None:
        assert prompt is not None
        return [_decoded(sys.stdin.buffer.read(), "standard input") if prompt == "-" else prompt]
    try:
        data = prompt_file.read_bytes()  # a pipe is read like a file
    except OSError as error:
        raise ValueError(f"--prompt-file {prompt_file}: {error.strerror}.") from None
    # Not str.splitlines: it would also end a prompt at U+2028, U+0085 and form feeds, which are text.
    if not (lines := [line for line in _decoded(data, str(prompt_file)).split("\n") if line.strip()]):
        raise ValueError(f"{prompt_file} holds no prompt: one a line is expected.")
    return lines


def _decoded(data: bytes, name: str) -> str:
    """UTF-8 text without a byte order mark; lines end in a line feed, as Python reads them."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no UTF-8 text ({error}): save it as UTF-8.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
