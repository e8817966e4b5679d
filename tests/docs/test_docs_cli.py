"""docs/cli.md: its commands parse, its options exist, its JSON keys are those that come."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import healthy
import jax.numpy as jnp
import numpy as np
import typer

from specjax.aot import planning
from specjax.cli import bench, bench_display, comparison, display, exactness, generate, main, plan_display
from specjax.cli.doctor import display as doctor_display
from specjax.cli.doctor import problems
from specjax.cli.doctor.self_check import SelfCheck
from specjax.profiling import machine, roofline
from specjax.stats import speedup_in_turn
from specjax.types import Stats, Status

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
GROUP = typer.main.get_command(main.app)


def _commands() -> list[list[str]]:
    """What the page's shell examples run, specjax itself left out."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    parts = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("|")]
    return [shlex.split(part)[1:] for part in parts if part.startswith("specjax ")]


def test_the_examples_parse():
    """Catches an option that was renamed, and a value that is no longer taken. (To run them all takes minutes.)"""
    commands = _commands()
    assert len(commands) >= 15
    for words in commands:
        if words[0] in GROUP.commands:  # type: ignore[attr-defined]
            GROUP.commands[words[0]].make_context(words[0], words[1:])  # type: ignore[attr-defined]
        else:
            assert words[0] in {option for param in GROUP.params for option in param.opts}
    assert {words[0] for words in commands} >= set(GROUP.commands)  # type: ignore[attr-defined]


def test_the_options_exist():
    """Catches prose about an option that is gone."""
    parts = [GROUP, *GROUP.commands.values()]  # type: ignore[attr-defined]
    known = {option for part in parts for param in part.params for option in (*param.opts, *param.secondary_opts)}
    assert set(re.findall(r"`(--?[a-z][a-z0-9-]*)", PAGE)) - {"-vv"} <= known | {"--help"}


def _documented(command: str) -> set[str]:
    """The keys in the table of one command."""
    table = re.search(rf"\| key of `{command} --json` \| \|\n\|---\|---\|\n(.*?)\n\n", PAGE, re.DOTALL)
    assert table is not None
    return {key for row in table[1].splitlines() for key in re.findall(r"`(\w+)`", row.split("|")[1])}


def _nested(key: str) -> set[str]:
    """What the page says is inside of a key."""
    return {
        word
        for row in re.findall(rf"^\| `{key}`.*?\|(.*)$", PAGE, re.MULTILINE)
        for word in re.findall(r"`(\w+)`", row)
    }


def test_json_keys_are_documented():
    """Catches a key that came, went or changed its name without the page, which calls them stable."""
    counts = np.ones((1, 2), np.int32)
    stats = Stats(*(counts[:, 0],) * 2, *(counts,) * 6, counts[:, 0])
    row = generate.Row("prompt", "text", [1], [0], Status.LENGTH)
    in_turn = speedup_in_turn([1.0], [1.0])
    summary = generate.Summary([row], stats, 2, "fixed", 1.0, 1.0, in_turn, 1, True, 0.1, None, None, "cpu", False)
    made_up = machine.Machine("made up", 1e9, 1e12, "measured")
    split = {"drafting": 1.0, "verification": 1.0, "plain": 0.0}
    rates = {
        "tokens_per_pass": 2.0,
        "acceptance": 0.5,
        "tokens_per_second": 2.0,
        "speedup": 1.0,
        "speedups": [1.0],
        "busy": False,
    }
    line = bench.Line(
        2, "fixed", 1, 1.0, **rates, call_tokens_per_second=2.0, call_speedup=1.0, work=roofline.Work(1.0, 1.0),
        limit_seconds=1.0, draft_lengths=[0, 0, 1], draft_utilisation=0.5, acceptance_by_position=[0.5, 0.5],
        predicted_speedup=1.0, time_split=split,
    )  # fmt: skip
    pair = SimpleNamespace(target=SimpleNamespace(params=jnp.ones(1)))
    finding = exactness.Finding("a check", True, "in detail", 1.0)
    checked = problems.Report(healthy.HEALTHY, [], SelfCheck([finding], healthy.PACE, [], 1.0, 1.0))
    nothing = {**dict.fromkeys(planning.Report._fields), "programs": [], "costs": {}, "collectives": []}
    plan = planning.Report(**nothing)  # type: ignore[arg-type]
    said = {
        "specjax generate": display.as_json(summary),
        "specjax bench": bench_display.as_json([bench.Speed([line], comparison.Setting(), made_up, 1.0, "float32")]),
        "specjax bench --verify exactness": display.findings_as_json([finding], pair),  # type: ignore[arg-type]
        "specjax compile": plan_display.as_json(plan),
        "specjax doctor": doctor_display.as_json(checked),
    }
    for command, found in said.items():
        assert _documented(command) == found.keys(), command
    inside = {
        "results": said["specjax generate"]["results"][0],
        "lines": {**said["specjax bench"]["lines"][0], **roofline.Work(1, 1)._asdict(), **split},
        "machine": made_up._asdict(),
        "checks": finding._asdict(),
        "host": said["specjax doctor"]["host"],
        "devices": said["specjax doctor"]["devices"][0],
        "programs": said["specjax doctor"]["programs"],
        "problems": problems.Problem._fields,
        "check": {**said["specjax doctor"]["check"], **said["specjax doctor"]["check"]["speed"]},
    }
    for key, fields in inside.items():
        assert set(fields) <= _nested(key), key
