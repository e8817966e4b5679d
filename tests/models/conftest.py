"""What the tests of the models share: random transformers models to compare with, raw safetensors, test data."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import transformers
import xla_options

from specjax import models

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


class RawTensor(NamedTuple):
    """A tensor as the file holds it."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


@pytest.fixture(autouse=True, scope="session")
def quiet_transformers() -> None:
    """No progress bars, no advice."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def torch() -> Iterator[ModuleType]:
    """PyTorch, on one thread: these models are too small to share out. Skips where there is none."""
    module = pytest.importorskip("torch", reason="needs PyTorch to compare with: pip install torch==2.13.0")
    threads = module.get_num_threads()
    module.set_num_threads(1)
    yield module
    module.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Finds a file or folder of the shared test data, or skips and says so."""

    def find(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.exists():
            pytest.skip(f"{path} is missing: this test needs the shared test data, which is not in the repository")
        return path

    return find


@pytest.fixture(scope="session")
def make_reference(torch) -> Callable[..., Any]:
    """Makes a transformers model of a config in float32, every parameter random.

    transformers starts biases at 0 and norms at 1; a loader that forgot them would pass unseen.
    """

    def make(model_type: str, seed: int = 0, **options: Any) -> Any:
        config = transformers.AutoConfig.for_model(model_type, **options)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=random)
                if parameter.ndim == 2:
                    is_embedding = name.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight"))
                    parameter.copy_(noise * (0.7 if is_embedding else 1.5 * min(parameter.shape) ** -0.5))
                else:
                    parameter.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))
        return model

    return make


@pytest.fixture(scope="session")
def read_reference(torch) -> Callable[[Path], Any]:
    """Reads a folder with transformers, in float32."""

    def read(folder: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()

    return read


@pytest.fixture(scope="session")
def reference_logits(torch) -> Callable[[Any, Any], np.ndarray]:
    """What a transformers model says of one unpadded text: [T] -> [T, V]."""

    def logits(model: Any, tokens: Any) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.tensor(np.asarray(tokens)[None]).long(), use_cache=False).logits[0].numpy()

    return logits


@pytest.fixture(scope="session")
def quickly() -> Callable[..., Any]:
    """jax.jit that compiles badly: compiling is most of the time here, and most programs run once."""
    return functools.partial(jax.jit, compiler_options=xla_options.OPTIONS)


@pytest.fixture(scope="session")
def our_logits(quickly) -> Callable[[models.Loaded, Any], np.ndarray]:
    """What specjax says of whole texts: [B, T] -> [B, T, V]."""

    @functools.partial(quickly, static_argnums=0)
    def read(model, params, tokens):
        batch, width = tokens.shape
        cache = model.init_cache(params, batch, width)
        return model.apply(params, tokens, cache, model.init_block(params, batch, width)).logits

    def logits(loaded: models.Loaded, tokens: Any) -> np.ndarray:
        return np.asarray(read(loaded.model, loaded.params, np.asarray(tokens, np.int32)))

    return logits


@pytest.fixture(scope="session")
def raw_tensors() -> Callable[[Path], dict[str, RawTensor]]:
    """Every tensor of a folder's safetensors files, parsed here by hand: no library between the test and the bytes."""

    def read(folder: Path) -> dict[str, RawTensor]:
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            data = file.read_bytes()
            start = 8 + int.from_bytes(data[:8], "little")
            for name, entry in json.loads(data[8:start]).items():
                if name != "__metadata__":
                    first, last = entry["data_offsets"]
                    content = data[start + first : start + last]
                    tensors[name] = RawTensor(entry["dtype"], tuple(entry["shape"]), content)
        return tensors

    return read


TINY_LLAMA = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_folder(make_reference, tmp_path_factory) -> Path:
    """A tiny random Llama with an output layer of its own, saved by transformers. Read-only: copy before damaging."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    make_reference("llama", **TINY_LLAMA).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_copy(tiny_folder, tmp_path) -> Path:
    """A copy of `tiny_folder` to damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Changes fields of a folder's config.json; None stays null, `drop` names fields to remove."""

    def edit(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in config.items() if name not in drop}))

    return edit
