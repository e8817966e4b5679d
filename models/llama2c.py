"""llama2.c's `.bin` files (version 0): weights and tokenizer.

Layout read from the format's description (github.com/karpathy/llama2.c, export.py and run.c): seven int32 (dim,
hidden_dim, layers, heads, kv_heads, vocab, max positions; a negative vocab says that the output layer is stored too),
then float32 tensors, each for all layers at once.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.models import llama
from specjax.models.checkpoint import Loaded
from specjax.models.family import assemble
from specjax.sharding import Layout, Rules

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_HEADER = 28
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip


def is_model(path: Path) -> bool:
    """Whether a file is as large as its header asks for: other formats end in `.bin` too."""
    with path.open("rb") as file:
        header = file.read(_HEADER)
    if len(header) < _HEADER:
        return False
    config = _config(header)
    return min(config[name] for name in _SIZES) >= 1 and _size(_stacked(config)) == path.stat().st_size


def load(path: Path, dtype: Any = None, layout: Layout | None = None, rules: Rules | None = None) -> Loaded:
    """A Llama model from a version 0 file.

    Raises:
      ValueError: the file's size does not fit its header.
    """
    data = path.read_bytes()
    if len(data) < _HEADER:
        raise ValueError(f"{path} holds {len(data)} bytes, too few for a llama2.c header of {_HEADER}.")
    config = _config(data)
    if min(config[name] for name in _SIZES) < 1:
        raise ValueError(f"{path} is not a llama2.c version 0 file: its header reads {config}.")
    heads, kv_heads, vocab = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    stacked = _stacked(config)
    wanted = _size(stacked)
    if len(data) != wanted:
        raise ValueError(f"{path} holds {len(data)} bytes where its header asks for {wanted}: not a version 0 file?")

    tensors, offset = {}, _HEADER
    for name, shape in stacked.items():
        count = int(np.prod(shape))
        tensors[name] = np.frombuffer(data, "<f4", count, offset).reshape(shape)
        offset += 4 * count
    for name, count in (("self_attn.q_proj.weight", heads), ("self_attn.k_proj.weight", kv_heads)):
        tensors[name] = _to_halves(tensors[name], count)

    def pick(name: str, place: jax.sharding.Sharding | None) -> jax.Array:
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            value = tensors[rest][int(layer)]
        else:
            value = tensors[name]
        return jax.device_put(value.astype(jnp.dtype(dtype or jnp.float32)), place)

    built = llama.build(llama.read_config(config), vocab, layout)
    built = built if rules is None else built._replace(rules=rules)
    return Loaded(built.model, assemble(built, pick), config, path)


def _config(header: bytes) -> dict[str, Any]:
    """The header's content in the form of a config.json."""
    width, inner, layers, heads, kv_heads, signed_vocab, positions = struct.unpack("<7i", header[:_HEADER])
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": abs(signed_vocab),
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": signed_vocab > 0,
        "bos_token_id": 1,
        "eos_token_id": [1, 2],  # training texts follow each other, and each begins with BOS: llama2.c stops there
    }


def _stacked(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The file's tensors in order, and their shapes."""
    vocab, width, inner, layers, heads, kv_heads, positions = (config[name] for name in _SIZES)
    head_dim = width // heads
    kv_width = kv_heads * head_dim
    stacked = {
        "model.embed_tokens.weight": (vocab, width),
        "input_layernorm.weight": (layers, width),
        "self_attn.q_proj.weight": (layers, width, width),
        "self_attn.k_proj.weight": (layers, kv_width, width),
        "self_attn.v_proj.weight": (layers, kv_width, width),
        "self_attn.o_proj.weight": (layers, width, width),
        "post_attention_layernorm.weight": (layers, width),
        "mlp.gate_proj.weight": (layers, inner, width),
        "mlp.down_proj.weight": (layers, width, inner),
        "mlp.up_proj.weight": (layers, inner, width),
        "model.norm.weight": (width,),
        "angles": (2, positions, head_dim // 2),
    }
    return stacked if config["tie_word_embeddings"] else {**stacked, "lm_head.weight": (vocab, width)}


def _size(stacked: dict[str, tuple[int, ...]]) -> int:
    """Bytes of a file with these tensors."""
    return _HEADER + 4 * sum(math.prod(shape) for shape in stacked.values())


def _to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """From llama2.c's layout, with rotary pairs side by side, to Hugging Face's, with pairs half a head apart."""
    layers, outputs, inputs = weight.shape
    pairs = weight.reshape(layers, heads, outputs // heads // 2, 2, inputs)
    return pairs.swapaxes(2, 3).reshape(weight.shape)


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The SentencePiece-like BPE of a tokenizer.bin as a `tokenizers.Tokenizer`; BOS (id 1) goes first.

    Scores rank the merges: the two neighbouring tokens whose union has the best score are merged first.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    data, offset = path.read_bytes(), 4
    pieces: list[str] = []
    scores: list[float] = []
    for index in range(vocab_size):
        if offset + 8 > len(data):
            raise ValueError(f"{path} ends after {index} of {vocab_size} tokens: is it this model's tokenizer?")
        score, length = struct.unpack_from("<fi", data, offset)
        offset += 8
        pieces.append(data[offset : offset + length].decode("utf-8", errors="replace"))
        scores.append(score)
        offset += length
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    pieces[3:] = [piece.replace(" ", "▁") for piece in pieces[3:]]
    vocab = {piece: index for index, piece in reversed(list(enumerate(pieces)))}
    merges = []
    for piece, index in vocab.items():
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [(-scores[index], index, pair) for pair in splits if pair[0] in vocab and pair[1] in vocab]
    ranked = [pair for _, _, pair in sorted(merges, key=lambda merge: merge[:2])]
    tokenizer = Tokenizer(models.BPE(vocab, ranked, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
