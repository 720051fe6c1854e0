"""The tiny LLaVA: transformers' own classes (CLIP tower, two-layer projector, Llama) at 1.7 million parameters."""

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dynamic_llava.tiny.world.scenes import IMAGE_SIZE, PATCH_SIZE, TOKENS_PER_IMAGE

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def tiny_config(vocab_size: int, pad_id: int, bos_id: int, eos_id: int, image_id: int) -> LlavaConfig:
    """Shapes of the shipped base: tower 96 x 4 layers, decoder 128 x 6 layers with 4 heads, 64 image tokens.

    The features of the last tower layer are used (the tower has no spare layer), without CLS as in LLaVA-1.5.
    """
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        projection_dim=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=pad_id,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=TOKENS_PER_IMAGE,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        pad_token_id=pad_id,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
    )


def build_tiny_llava(config: LlavaConfig, seed: int) -> LlavaForConditionalGeneration:
    """Randomly initialised float32 model; the same seed gives the same weights. The global RNG is left untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config).float()


def build_tower(config: LlavaConfig, seed: int) -> CLIPVisionModel:
    """The vision tower of `config` alone, randomly initialised; independent of the text side's shapes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPVisionModel(config.vision_config).float()
