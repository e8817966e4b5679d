"""llama.cpp as a process of its own: reads requests, a JSON object a line, and answers each with one.

    python benchmarks/llama_cpp_child.py TARGET DRAFT --dtype float32 --threads 2

Runs where the extra `peers` is installed (llama-cpp-python, gguf): jax and llama.cpp need not share an environment, nor
a process, where one's threads would wait beside the other's. It calls llama.cpp's own C interface: a batch in, logits
out, the token their argmax. Requests:

    {"do": "plain", "prompt": [ids], "new": 128}            -> {"tokens": [ids], "passes": 127}
    {"do": "speculative", ..., "draft_len": 5}              -> the same, and "drafted", "accepted"
    {"do": "pass", "tokens": 6, "live": 100, "repeats": 30} -> {"seconds": the median pass over 6 tokens}
    {"do": "draft pass", ...}                               -> the same, of the draft model
    {"do": "about"}                                         -> {"version": ..., "system": what it was compiled for}
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from to_gguf import convert


class Context:
    """One model and its cache, one sequence."""

    def __init__(self, file: Path, *, slots: int, threads: int, dtype: str):
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self._api = api = llama_cpp
        self._model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = slots
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        if dtype == "float32":  # as specjax keeps it; with float16 the cache is llama.cpp's default, float16
            params.type_k = params.type_v = api.GGML_TYPE_F32
        self._context = api.llama_init_from_model(self._model, params)
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(slots, 0, 1)
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self.length = 0  # tokens in the cache

    def apply(self, tokens: list[int], *, logits: int | None = None) -> list[int]:
        """Appends `tokens`; the most likely token after each of the last `logits` of them, by default of all."""
        count = len(tokens)
        first = 0 if logits is None else count - logits
        batch = self._batch
        batch.n_tokens = count
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = self.length + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index >= first
        status = self._api.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self.length += count
        out = ctypes.cast(self._api.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(out, (count - first, self._vocab_size)).argmax(-1).tolist()

    def keep(self, length: int) -> None:
        """Forgets all tokens past the first `length`."""
        if length < self.length:
            self._api.llama_memory_seq_rm(self._memory, 0, length, -1)
            self.length = length


def plain(target: Context, prompt: list[int], new: int) -> dict:
    """Greedy decoding, one token a pass."""
    target.keep(0)
    tokens = target.apply(prompt, logits=1)
    while len(tokens) < new:
        tokens += target.apply(tokens[-1:])
    return {"tokens": tokens, "passes": new - 1}


def speculative(target: Context, draft: Context, prompt: list[int], new: int, draft_len: int) -> dict:
    """Greedy speculation, as specjax's loop does it: K tokens drafted one by one, K + 1 verified in one pass."""
    target.keep(0)
    draft.keep(0)
    text = prompt + target.apply(prompt, logits=1)
    end = len(prompt) + new
    passes = drafted = accepted = 0
    draft.apply(prompt[:-1], logits=1)
    while len(text) < end:
        # The draft has read all but the last token, or all but the last two after a full acceptance.
        width = min(draft_len, end - len(text) - 1)
        proposed: list[int] = []
        unread = text[draft.length :]
        while len(proposed) < width:
            proposed += draft.apply(unread, logits=1)
            unread = proposed[-1:]
        wanted = target.apply(text[-1:] + proposed)
        kept = 0
        while kept < width and proposed[kept] == wanted[kept]:
            kept += 1
        text += wanted[: kept + 1]
        target.keep(len(text) - 1)
        draft.keep(len(text) - 1)
        passes, drafted, accepted = passes + 1, drafted + width, accepted + kept
    return {"tokens": text[len(prompt) :], "passes": passes, "drafted": drafted, "accepted": accepted}


def time_pass(context: Context, tokens: int, live: int, repeats: int) -> dict:
    """The median time of a pass over `tokens` tokens with `live` in the cache, logits of all of them included."""
    context.keep(0)
    ids = np.random.default_rng(0).integers(2, 4000, live + tokens).tolist()
    context.apply(ids[:live], logits=1)
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        context.apply(ids[live:])
        times.append(time.perf_counter() - start)
        context.keep(live)
    return {"seconds": statistics.median(times[3:])}


def _about() -> dict:
    import llama_cpp  # pyright: ignore[reportMissingImports]

    return {"version": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode()}


def main() -> None:
    """Converts both models into a temporary folder, then answers until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=512)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        contexts = {}
        for name in ("target", "draft"):
            file = Path(folder) / f"{name}.gguf"
            convert(getattr(arguments, name), file, arguments.dtype)
            contexts[name] = Context(file, slots=arguments.slots, threads=arguments.threads, dtype=arguments.dtype)
        target, draft = contexts["target"], contexts["draft"]
        handlers = {
            "plain": lambda **asked: plain(target, **asked),
            "speculative": lambda **asked: speculative(target, draft, **asked),
            "pass": lambda **asked: time_pass(target, **asked),
            "draft pass": lambda **asked: time_pass(draft, **asked),
            "about": _about,
        }
        for line in sys.stdin:
            asked = json.loads(line)
            print(json.dumps(handlers[asked.pop("do")](**asked)), flush=True)


if __name__ == "__main__":
    main()
