"""What `specjax doctor` found, for a terminal and as plain data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from specjax.cli.display import finding_lines
from specjax.cli.doctor.environment import Device, Environment
from specjax.cli.doctor.problems import MEANING, Problem, Report, Severity
from specjax.cli.doctor.self_check import Pace, SelfCheck, verdict
from specjax.profiling import machine
from specjax.stats import BUSY

_STYLES = {Severity.error: "bold red", Severity.warning: "yellow", Severity.note: "cyan"}


def facts(found: Environment) -> Table:
    """The machine."""
    table = _columns()
    host = found.host

    def row(name: str, said: str) -> None:
        table.add_row(name, Text(said))  # a plain string would be read as markup: [cuda12] would be gone

    versions = [f"{package.name} {package.version}" for package in found.packages if package.version]
    row("specjax", f"{found.version} from {_at_home(found.folder)}")
    row("packages", ", ".join([f"python {host.python}", *versions]))
    memory = "" if host.memory is None else f", {_bytes(host.memory)}"
    row("machine", f"{host.system}; {host.processor}, {_count(host.cores, 'core')}{memory}")
    row("devices", "\n".join(map(_device, found.devices.found)) or "none")
    row("backend", MEANING.get(found.devices.backend, found.devices.backend or ""))
    given = [f"{name}={value}" for name, value in found.settings.items() if value is not None]
    unset = [name for name, value in found.settings.items() if value is None]
    table.add_row("settings", Group(*map(Text, given), Text(f"not set: {', '.join(unset)}", "dim")))
    row("programs", _programs(found))
    return table


def _columns() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True, min_width=8)
    table.add_column(overflow="fold")
    return table


def problems(found: list[Problem]) -> Iterator[Text | Table]:
    """What is wrong and what to do, or that nothing is."""
    yield Text()
    if not found:
        yield Text("no problems found", "green")
    table = _columns()
    for problem in found:
        said = Group(Text(problem.what), Text(problem.cure, "dim"))
        table.add_row(Text(problem.severity.value, _STYLES[problem.severity]), said)
    yield table


def result(check: SelfCheck | None) -> Iterator[Text]:
    """What the self-check said; None where it could not begin."""
    yield Text()
    if check is None:
        yield Text("The self-check was not run: first the errors above.", "bold red")
        return
    for finding in check.findings:
        yield from finding_lines(finding)
    yield Text()
    if not check.passed:
        yield Text("Something is broken here: trust no output of this machine, and report the lines above.", "bold red")
    elif check.left_out:
        yield Text(f"No time was left for: {'; '.join(check.left_out)}.", "bold yellow")
        yield Text("Run it again: compiled programs are kept. On an idle machine nothing is left out.", "dim")
    elif check.pace is None:
        yield Text(f"Exact. How fast cannot be said: {BUSY}.", "bold yellow")
    else:
        yield Text(verdict(check.pace), "bold green" if check.pace.pays else "bold yellow")
        yield Text(
            f"That is the shipped pair of small models in {check.pace.dtype}, one row at a time; specjax bench --model "
            "... --draft ... measures yours.",
            "dim",
        )
    yield Text(f"{check.measuring:.1f} s of measuring, {check.compiling:.1f} s of compiling", "dim")


def as_json(report: Report) -> dict[str, Any]:
    """The whole report as plain data: seconds and bytes; null for what is not known or was not done."""
    found, check = report.environment, report.check
    return {
        "healthy": report.is_healthy,
        "version": found.version,
        "folder": found.folder,
        "packages": {package.name: package.version for package in found.packages},
        "host": found.host._asdict(),
        "hardware": found.hardware,
        "backend": found.devices.backend,
        "devices": [device._asdict() for device in found.devices.found],
        "devices_failure": found.devices.failure,
        "settings": found.settings,
        "programs": found.programs._asdict(),
        "problems": [problem._asdict() for problem in report.problems],
        "check": None if check is None else _check(check),
    }


def _check(check: SelfCheck) -> dict[str, Any]:
    pace = check.pace
    return {
        "passed": check.passed,
        "findings": [finding._asdict() for finding in check.findings],
        "left_out": check.left_out,
        "speed": None if pace is None else _pace(pace),
        "compiling_seconds": check.compiling,
        "measuring_seconds": check.measuring,
    }


def _pace(pace: Pace) -> dict[str, Any]:
    said = {"speedup": pace.speedup, "busy": pace.in_turn.is_busy, "pays": pace.pays, "verdict": verdict(pace)}
    return {**pace._asdict(), **said}


def _device(device: Device) -> str:
    peak = machine.known(device.kind, "bfloat16")
    parts = [f"{device.number} x {device.kind}"]
    if device.memory is not None:
        parts.append(f"{_bytes(device.memory)} for JAX")
    if peak is not None:
        parts.append(f"{peak.bandwidth / 1e9:.0f} GB/s, {peak.flops / 1e12:.0f} TFLOP/s in bfloat16 ({peak.origin})")
    return ", ".join(parts)


def _programs(found: Environment) -> str:
    kept, own = found.programs, found.settings["jax_compilation_cache_dir"]
    if kept.folder is None:
        return (
            "kept nowhere: there is no home directory" if own is None else "kept where jax_compilation_cache_dir says"
        )
    said = f"{_count(kept.files, 'compiled program')}, {_bytes(kept.size)}, in {_at_home(kept.folder)}"
    return said if own is None else f"{said}; not used, as jax_compilation_cache_dir is set"


def _at_home(folder: str) -> str:
    home = os.path.expanduser("~")  # stays as it is where there is none
    return f"~{folder.removeprefix(home)}" if folder.startswith(f"{home}/") else folder


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _bytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
