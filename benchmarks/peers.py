"""Other libraries on the same weights and prompts, as contenders of run.py."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from prompts import Prompts


class Outcome(NamedTuple):
    """What one run of a contender emitted, and how; None for what it does not say."""

    tokens: list[list[int]]  # of each prompt
    passes: int | None = None  # target passes after prefill, batches one after the other
    row_passes: int | None = None  # the same, summed over rows
    drafted: int | None = None
    accepted: int | None = None


class Contender(NamedTuple):
    """One way to generate."""

    name: str
    run: Callable[[], Outcome]
    draft_len: int | None = None  # None: no draft model
    dtype: str = "float32"


def transformers(
    target_path: Path, draft_path: Path, prompts: Prompts, max_new_tokens: int, draft_lens: list[int], dtype: str
) -> list[Contender]:
    """transformers on PyTorch: greedy, assisted by the draft model, and by prompt lookup."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()

    def read(path: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    target, draft = read(target_path), read(draft_path)
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0

    def run(**options) -> list[list[int]]:
        emitted = []
        for tokens, length in zip(prompts.tokens, prompts.lengths, strict=True):
            ids = torch.tensor(tokens[None, :length].astype(np.int64))
            with torch.no_grad():
                out = target.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
                    eos_token_id=None, pad_token_id=0, **options,
                )  # fmt: skip
            emitted.append(out[0, length:].tolist())
        return emitted

    def greedy() -> Outcome:
        tokens = run()
        passes = sum(len(row) - 1 for row in tokens)
        return Outcome(tokens, passes, passes)

    def assisted(draft_len: int) -> Outcome:
        draft.generation_config.num_assistant_tokens = draft_len
        return Outcome(run(assistant_model=draft))

    return [
        Contender("transformers greedy", greedy, None, dtype),
        *(Contender(f"transformers assisted K={k}", lambda k=k: assisted(k), k, dtype) for k in draft_lens),
        Contender("transformers prompt lookup", lambda: Outcome(run(prompt_lookup_num_tokens=5)), None, dtype),
    ]


class LlamaCpp:
    """llama.cpp in a process of its own (llama_cpp_child.py), in a Python that has the extra `peers`."""

    def __init__(self, python: str, target_path: Path, draft_path: Path, dtype: str, slots: int, threads: int):
        child = Path(__file__).with_name("llama_cpp_child.py")
        options = ["--dtype", dtype, "--slots", str(slots), "--threads", str(threads)]
        # llama.cpp writes more than a pipe holds.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, str(child), str(target_path), str(draft_path), *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        self.dtype = dtype

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """One request and its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._log.seek(0)
            raise RuntimeError(f"llama_cpp_child.py ended: {self._log.read()[-2000:]}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        self._log.close()

    def contenders(self, prompts: Prompts, max_new_tokens: int, draft_lens: list[int]) -> list[Contender]:
        """Plain greedy decoding, and greedy speculation with the draft model for each K."""
        rows = [tokens[:length].tolist() for tokens, length in zip(prompts.tokens, prompts.lengths, strict=True)]

        def run(what: str, **options) -> Outcome:
            answers = [self.ask(what, prompt=row, new=max_new_tokens, **options) for row in rows]
            passes, drafted, accepted = (
                sum(answer.get(name, 0) for answer in answers) for name in ("passes", "drafted", "accepted")
            )
            return Outcome([answer["tokens"] for answer in answers], passes, passes, drafted, accepted)

        name = f"llama.cpp {self.dtype}"
        return [
            Contender(f"{name} plain", lambda: run("plain"), None, self.dtype),
            *(
                Contender(f"{name} speculative K={k}", lambda k=k: run("speculative", draft_len=k), k, self.dtype)
                for k in draft_lens
            ),
        ]
