"""What each layer of a model keeps in its KV cache, read from ``config.json`` alone.

The keys are those of Hugging Face transformers; where a family's configuration class fills in a layer
pattern that its ``config.json`` leaves out, the pattern is in EVERY_NTH_IS_FULL with its source. Which of
the keys vLLM follows was read in vllm/transformers_utils/model_arch_config_convertor.py and is held against
vLLM itself by tests/kvcache/test_accounting.py. What keeps something else than keys and values is refused
by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from disagglab.errors import ConfigError, Problem
from disagglab.kv.shape import DTYPES, KvShape, Layer

Config = Mapping[str, Any]

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads")
HIDDEN = ("hidden_size", "n_embd", "d_model")
HEAD_DIM = ("head_dim", "hidden_size_per_head", "kv_channels")
KV_HEADS = (
    *("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups"),
    "kv_n_heads",
)
POSITIONS = ("max_position_embeddings", "n_positions", "seq_length")
NESTED = ("text_config", "language_config", "llm_config")  # the language model inside a multimodal one
DTYPE_KEYS = ("torch_dtype", "dtype")

FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = {FULL, SLIDING}

# Every n-th layer is full, the others slide (transformers: models/*/configuration_*.py, __post_init__).
EVERY_NTH_IS_FULL = {
    "gemma2": 2,
    "gemma3_text": 6,
    "gemma3": 6,
    "gemma3n_text": 5,
    "gemma3n": 5,
    "cohere2": 4,
    "exaone4": 4,
    "olmo3": 4,
    "gpt_oss": 2,
}
# Their configuration class leaves windows off unless use_sliding_window says otherwise, whatever
# sliding_window is.
OFF_BY_DEFAULT = {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"}
# Cohere's window counts the tokens behind the present one (vllm/model_executor/models/commandr.py).
WINDOW_EXCLUDES_PRESENT = {"cohere2"}
MAX_WINDOW_LAYERS = 28  # the default of Qwen's configuration classes
# Served with one latent vector per token (is_deepseek_mla in model_arch_config_convertor.py).
LATENT = {
    "deepseek_v2",
    "deepseek_v3",
    "kimi_k2",
    "glm4_moe_lite",
    "pangu_ultra_moe",
    "axk1",
}

# vLLM builds these attention layers without the cache settings: --kv-cache-dtype changes nothing
# (models/falcon.py).
KEEPS_MODEL_DTYPE = {"falcon", "RefinedWeb", "RefinedWebModel"}

REFUSED_KEYS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"^is_encoder_decoder$", "encoder-decoder cross attention"),
        (r"mamba|^ssm_|^state_size$|^time_step_|^hybrid_override_pattern$", "Mamba state"),
        (r"^attn_layer_(period|offset|indices)$|^full_attn_idxs$", "Mamba state"),
        (r"^linear_(attn|attention|conv|key|value|num)|^full_attention_interval$", "linear-attention state"),
        (r"rwkv|^lru_width$|^block_types$|^_block_types$|^conv_L_cache$", "recurrent state"),
        (r"^index_(topk|head_dim|n_heads)$|^compress_ratios?$", "a sparse-attention indexer's own cache"),
        (r"^attention_chunk_size$", "chunked local attention"),
        (r"^swa_|^cross_attention_layers$|^attention_other_setting$", "another cache in some layers"),
        (r"^use_cla$", "a cache that neighbouring layers share"),
    )
)
RECURRENT_TYPES = ("rwkv", "mamba", "falcon_mamba", "recurrent_gemma", "xlstm", "retnet")
ENCODERS = re.compile(r"bert|electra|mpnet|^vit|clip|^dinov|^t5|^bart$|whisper")
MOST_LAYERS, MOST = 10_000, 10**9  # beyond them a number is a slip, and its arithmetic no help


class Refused(Exception):
    """A config that cannot be computed: the key, what is wrong with it, what mends it."""

    def __init__(self, key: str, wrong: str, mend: str = "use the model's own config.json") -> None:
        super().__init__(f"{key}: {wrong}")
        self.key, self.wrong, self.mend = key, wrong, mend


def shape(config: Config, dtype: str = "auto", origin: str = "config.json") -> KvShape:
    """The KV shape of a decoder.

    Args:
        config: the parsed ``config.json``.
        dtype: dtype of the KV cache, a key of :data:`disagglab.kv.shape.DTYPES`; "auto": the model's own.
        origin: where the config came from, for messages.

    Raises:
        ConfigError: naming the key, if a value is missing, contradicts another one, or stands for a cache
            that is not computed (recurrent or linear-attention state, cross attention, sparse indexers).
    """
    try:
        text = text_config(config)
        _refuse(text)
        if text is not config:
            _refuse(config)
        layers = _layers(text)
        kept = _dtype(config, text) if dtype == "auto" else dtype
        if kept not in DTYPES:
            raise Refused("dtype", f"{kept} is not known", f"choose one of {', '.join(DTYPES)}")
        if DTYPES[kept][0] == 1 and text.get("model_type") in KEEPS_MODEL_DTYPE:
            raise Refused(
                "model_type", "vLLM keeps this model's cache in the model's dtype", "leave dtype at auto"
            )
        if DTYPES[kept][1] and any(not layer.value_dim for layer in layers):
            raise Refused("kv_lora_rank", f"{kept} is not defined for MLA", "choose fp8 or a 16-bit dtype")
        return KvShape(layers, kept)
    except Refused as error:
        raise ConfigError([Problem(origin, error.key, error.wrong, error.mend)]) from error


def query_heads(config: Config, origin: str = "config.json") -> int:
    """Attention heads of the language model, which tensor parallelism divides.

    Raises:
        ConfigError: if the config names none.
    """
    return _number_of(config, HEADS, origin)


def max_positions(config: Config, origin: str = "config.json") -> int:
    """Longest sequence that the position encoding was made for, tokens.

    Raises:
        ConfigError: if the config names none.
    """
    return _number_of(config, POSITIONS, origin)


def _number_of(config: Config, names: Sequence[str], origin: str) -> int:
    try:
        return _number(text_config(config), names)
    except Refused as error:
        raise ConfigError([Problem(origin, error.key, error.wrong, error.mend)]) from error


def text_config(config: Config) -> Config:
    """The language model's part of a config: a nested one in multimodal models, else the config itself."""
    for key in NESTED:
        nested = config.get(key)
        if isinstance(nested, Mapping) and not any(name in config for name in LAYERS):
            return nested
    return config


def _refuse(config: Config) -> None:
    model_type = str(config.get("model_type", ""))
    for key, value in config.items():
        for pattern, what in REFUSED_KEYS:
            if value and pattern.search(key):
                raise Refused(key, f"{what} is not computed", "use a model whose layers keep keys and values")
    if ENCODERS.search(model_type):
        raise Refused(
            "model_type", f"{model_type} is no decoder; it keeps no such cache", "use a decoder model"
        )
    if model_type.startswith(RECURRENT_TYPES):
        raise Refused("model_type", f"{model_type}: recurrent state is not computed", "use another model")
    if any(kind != 1 for kind in _list(config, "attn_type_list")):
        raise Refused("attn_type_list", "linear-attention state is not computed", "use another model")


def _list(config: Config, key: str) -> list[Any]:
    """A list, empty where the key is missing or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, list | tuple):
        raise Refused(key, f"{value!r} is not a list")
    return list(value or ())


def _positive(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise Refused(key, f"{value!r:.40} is not a whole number from 1 to {MOST:,}")
    return value


def _whole(config: Config, key: str) -> int:
    """A whole number of 0 or more; 0 where the key is missing or null."""
    value = config.get(key)
    if value is None or (value == 0 and not isinstance(value, bool)):
        return 0
    return _positive(key, value)


def _number(config: Config, names: Sequence[str], default: int | None = None) -> int:
    for name in names:
        if config.get(name) is not None:
            return _positive(name, config[name])
    if default is None:
        raise Refused(names[0], "missing", "use the config.json of a decoder model")
    return default


def _layers(config: Config) -> tuple[Layer, ...]:
    if config.get("block_configs") is not None:
        return _block_layers(config)
    count = _number(config, LAYERS)
    if count > MOST_LAYERS:
        raise Refused(LAYERS[0], f"{count:,} layers; more than {MOST_LAYERS:,} are a slip")
    if config.get("kv_lora_rank") is not None:
        return (_latent(config),) * count
    windows = _windows(config, count)
    shapes = [_heads(_of_layer(config, index), index, window is None) for index, window in enumerate(windows)]
    layers = [Layer(kv, dim, dim, window) for (kv, dim), window in zip(shapes, windows, strict=True)]
    shared = _whole(config, "num_kv_shared_layers")
    if shared >= count:
        raise Refused("num_kv_shared_layers", f"{shared} of {count} layers")
    return tuple(layers[: count - shared])  # the last ones read the cache of an earlier layer


def _of_layer(config: Config, index: int) -> Config:
    """The config as one layer sees it; transformers 5 writes what differs into ``per_layer_config``."""
    layers = config.get("per_layer_config") or {}
    if not isinstance(layers, Mapping):
        raise Refused("per_layer_config", f"{layers!r} is not an object")
    for number, own in layers.items():
        if not str(number).isdecimal() or not isinstance(own, Mapping):
            raise Refused("per_layer_config", f"{number!r}: {own!r} is not a layer's number and an object")
        if int(number) == index:
            return {**config, **own}
    return config


def _heads(config: Config, index: int, full: bool) -> tuple[int, int]:
    """KV heads and head dimension of one layer."""
    heads = _number(config, HEADS)
    kv_heads = _kv_heads(config, heads, index)
    if full and config.get("num_global_key_value_heads") and config.get("attention_k_eq_v"):
        kv_heads = _number(config, ("num_global_key_value_heads",))
    if heads % kv_heads:
        raise Refused("num_key_value_heads", f"{kv_heads} does not divide {heads} attention heads")
    if full and config.get("global_head_dim"):
        return kv_heads, _number(config, ("global_head_dim",))
    head_dim = _head_dim(config, heads)
    value_dim = config.get("v_head_dim")
    if value_dim not in (None, 0, head_dim):
        raise Refused("v_head_dim", f"{value_dim} beside a head_dim of {head_dim} is not computed")
    return kv_heads, head_dim


def _head_dim(config: Config, heads: int) -> int:
    for name in HEAD_DIM:
        if config.get(name):  # 0 and null: not given (model_arch_config_convertor.py)
            return _positive(name, config[name])
    hidden = _number(config, HIDDEN)
    if hidden % heads:
        wrong = f"{hidden} is not a multiple of {heads} attention heads, and head_dim is missing"
        raise Refused("hidden_size", wrong)
    return hidden // heads


def _kv_heads(config: Config, heads: int, index: int) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):  # Falcon, GPTBigCode
        return 1
    inner = config.get("attn_config")  # DBRX, MPT
    for name in KV_HEADS:
        value = config.get(name)
        if value is None and isinstance(inner, Mapping):
            value = inner.get(name)
        if isinstance(value, Sequence):
            count = _number(config, LAYERS)
            if len(value) != count:
                raise Refused(name, f"has {len(value)} entries for {count} layers")
            value = value[index]
        if value is not None:
            return _positive(name, value)
    return heads


def _latent(config: Config) -> Layer:
    model_type = str(config.get("model_type", "deepseek_v3"))
    if model_type not in LATENT:
        raise Refused(
            "kv_lora_rank", f"how vLLM keeps the cache of {model_type} is not known", "use another model"
        )
    rank = _number(config, ("kv_lora_rank",))
    return Layer(kv_heads=1, key_dim=rank + _number(config, ("qk_rope_head_dim",)), value_dim=0)


def _block_layers(config: Config) -> tuple[Layer, ...]:
    """Nemotron-NAS: every block has its own number of KV heads, or no attention at all."""
    heads = _number(config, HEADS)
    dim = _head_dim(config, heads)
    blocks = _list(config, "block_configs")
    count = _number(config, LAYERS)
    if len(blocks) != count:
        raise Refused("block_configs", f"has {len(blocks)} entries for {count} layers")
    layers = []
    for number, block in enumerate(blocks):
        attention = block.get("attention") if isinstance(block, Mapping) else None
        if not isinstance(attention, Mapping):
            raise Refused("block_configs", f"entry {number} says nothing of attention")
        if attention.get("no_op"):
            continue
        if attention.get("replace_with_linear"):
            continue  # a linear layer in its place keeps nothing
        group = _positive(
            f"block_configs[{number}].attention.n_heads_in_group", attention.get("n_heads_in_group")
        )
        if heads % group:
            raise Refused("block_configs", f"entry {number}: {group} heads in a group do not divide {heads}")
        layers.append(Layer(heads // group, dim, dim))
    if not layers:
        raise Refused("block_configs", "no layer keeps a KV cache", "use another model")
    return tuple(layers)


def _windows(config: Config, count: int) -> list[int | None]:
    """By layer the window in tokens, None for full attention."""
    model_type = str(config.get("model_type", ""))
    window = config.get("sliding_window")
    default_on = model_type not in OFF_BY_DEFAULT
    if model_type in EVERY_NTH_IS_FULL and "sliding_window" not in config:
        raise Refused("sliding_window", f"missing, and {model_type} has sliding layers")
    if (
        not config.get("use_sliding_window", default_on) or not window
    ):  # 0 and null: none (vllm/config/model.py)
        window = None
    else:
        window = _positive("sliding_window", window) + (model_type in WINDOW_EXCLUDES_PRESENT)
    kinds = _list(config, "layer_types")
    if config.get("layer_types") is None:
        slides = _pattern(config, model_type) if window else lambda index: False
        kinds = [SLIDING if slides(index) else FULL for index in range(count)]
    if len(kinds) != count:
        raise Refused("layer_types", f"has {len(kinds)} entries for {count} layers")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in LAYER_TYPES:
            raise Refused("layer_types", f"{kind} is not computed", f"only {FULL} and {SLIDING} are")
    if SLIDING in kinds and window is None:
        raise Refused("layer_types", f"names {SLIDING}, but sliding_window is missing or off")
    return [window if kind == SLIDING else None for kind in kinds]


def _pattern(config: Config, model_type: str) -> Callable[[int], bool]:
    """Which layers slide, by index, where ``layer_types`` does not say so."""
    if model_type == "smollm3":
        raise Refused(
            "use_sliding_window", "which layers of smollm3 slide is not computed", "use another model"
        )
    if model_type in OFF_BY_DEFAULT:
        first = _whole(config, "max_window_layers") if "max_window_layers" in config else MAX_WINDOW_LAYERS
        return lambda index: index >= first
    every = config.get("sliding_window_pattern", EVERY_NTH_IS_FULL.get(model_type))
    if every is None:
        return lambda index: True
    if isinstance(every, str) and set(every) == {"L", "G"}:  # EXAONE 4: LLLG
        return lambda index: every[index % len(every)] == "L"
    nth = _positive("sliding_window_pattern", every)
    return lambda index: (index + 1) % nth != 0


def _quantized(quantization: Any) -> str | None:
    """dtype of the cache that a quantization_config asks for (get_kv_cache_quant_algo_string in vLLM)."""
    if not isinstance(quantization, Mapping):
        return None
    inner = quantization.get("quantization")
    for place in (quantization, inner if isinstance(inner, Mapping) else {}):
        for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
            scheme = place.get(key)
            if not scheme or str(scheme).lower() == "none":
                continue
            bits = (scheme.get("num_bits"), scheme.get("type")) if isinstance(scheme, Mapping) else None
            if bits == (8, "float") or str(scheme).lower() == "fp8":
                return "fp8"
            raise Refused(f"quantization_config.{key}", f"{scheme!r:.80} is not computed", "name a dtype")
    return None


def _dtype(config: Config, text: Config) -> str:
    """What vLLM's "auto" keeps: what the checkpoint's quantization asks for, else the dtype of its weights.

    A checkpoint in float32, or of unsaid dtype, is served in 16 bits.
    """
    for source in (config, text):
        asked = _quantized(source.get("quantization_config"))
        if asked is not None:
            return asked
    for source in (text, config):
        for key in DTYPE_KEYS:
            named = str(source.get(key) or "").removeprefix("torch.")
            if named and named != "float32":
                return named
    return "bfloat16"
