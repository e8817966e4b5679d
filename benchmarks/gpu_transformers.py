"""transformers with a static cache and torch.compile, random weights: the peer of gpu.py, in a process of its own.

    python benchmarks/gpu_transformers.py '{"hidden_size": 2048, ...}' --context 1024 --max-new-tokens 256

Prints one JSON object: seconds of a decoding step by the difference of two lengths (as `specjax.speed` measures it),
eager with a dynamic cache and compiled with a static one; or why it was skipped. In a process of its own, so that its
memory is free again when jax begins.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=json.loads)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, without compilation")
    print(json.dumps(measure(parser.parse_args())))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The numbers, or {"skipped": why}."""
    try:
        import torch
        import transformers
    except ImportError as error:
        return {"skipped": str(error)}
    if not torch.cuda.is_available() and not arguments.rehearse:
        return {"skipped": f"torch {torch.__version__} sees no CUDA device"}
    device = "cpu" if arguments.rehearse else "cuda"
    config = transformers.LlamaConfig(**arguments.config)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        ids = torch.randint(0, config.vocab_size, (arguments.batch, arguments.context))
    slots = arguments.context + arguments.max_new_tokens

    def run(limit: int, *, compiled: bool) -> float:
        options: dict[str, Any] = {"disable_compile": not compiled or arguments.rehearse}
        if compiled:  # one size for both lengths: another would be compiled anew
            options["past_key_values"] = transformers.StaticCache(config=config, max_cache_len=slots)
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, min_new_tokens=limit, do_sample=False,
                pad_token_id=0, eos_token_id=None, **options,
            )  # fmt: skip
        if device == "cuda":
            torch.cuda.synchronize()
        assert out.shape[1] == arguments.context + limit
        return time.perf_counter() - start

    short, long = arguments.max_new_tokens // 4, arguments.max_new_tokens
    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name, compiled in (("eager, dynamic cache", False), ("compiled, static cache", True)):
        for limit in (short, long):
            run(limit, compiled=compiled)
        times = [run(long, compiled=compiled) - run(short, compiled=compiled) for _ in range(arguments.repeats)]
        found[name] = statistics.median(times) / (long - short)
    # Whether it was compiled at all: generate decides that by itself.
    found["compiled frames"] = int(torch._dynamo.utils.counters["frames"]["ok"])
    return found


if __name__ == "__main__":
    main()
