"""Shapes whose sizes do not follow from one another: what a formula assumes without saying so, one of them breaks."""

from tests.builders import tiny_config

TEXT = {
    "wide heads": {"head_dim": 24},
    "narrow heads": {"head_dim": 8},
    "attention bias": {"attention_bias": True},
    "MLP bias": {"mlp_bias": True},
}
FAMILIES = ("mistral", "qwen2", "qwen3")
WHOLE = {
    "tied head": {"tie_word_embeddings": True},
    "two feature layers": {"vision_feature_layer": [-2, -1]},
    "projector without bias": {"multimodal_projector_bias": False},
    "class token": {"vision_feature_select_strategy": "full", "image_seq_length": 17},
}
VARIANTS = [*TEXT, *WHOLE, *FAMILIES]


def variant_config(name, kv_heads=2, attention="eager", **sparsity):
    """Return the tiny configuration with this one thing unusual about it."""
    family = name if name in FAMILIES else "llama"
    config = tiny_config(kv_heads, attention, family=family, **sparsity)
    for key, value in TEXT.get(name, {}).items():
        setattr(config.text_config, key, value)
    for key, value in WHOLE.get(name, {}).items():
        setattr(config, key, value)
    if name == "tied head":
        config.text_config.tie_word_embeddings = True
    return config
