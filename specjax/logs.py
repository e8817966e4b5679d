"""Log messages of the library, under the logger `specjax`. Nothing is shown until the application configures logging.

    import logging
    logging.basicConfig(level=logging.INFO)

Info: models loaded and saved, programs traced. Warning: a reason why a result may be worse than it seems. Nothing is
logged while a program runs.
"""

from __future__ import annotations

import logging

_log = logging.getLogger("specjax")
_log.addHandler(logging.NullHandler())  # without one, Python prints warnings to standard error


def tracing(program: str, **facts: object) -> None:
    """Logs that a program is traced, with the facts that tell it apart from others.

    Call it in the body of a jitted function, which Python runs once for each new program. Two of these lines mean two
    compilations; the fact that differs is the reason.
    """
    _log.info("tracing %s: %s", program, ", ".join(f"{name}={value}" for name, value in facts.items()))


def in_short(count: float) -> str:
    """A large number in short form.

    >>> in_short(14_164_000), in_short(8_030_261_248), in_short(960)
    ('14.2M', '8.03G', '960')
    """
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{name}"
    return f"{count:.0f}"
