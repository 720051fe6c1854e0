"""Folders of other bases than LLaVA-1.5: byte-level tokenizers, chat templates of every style, other architectures."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

START, PAD, IMAGE = "<|begin_of_text|>", "<|pad|>", "<image>"
IMAGE_SIZE, PATCH = 32, 8

LLAMA_3 = (
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ALWAYS_ASKS = LLAMA_3.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OWN_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no system message here') }}{% endif %}{% endfor %}"
)
NEVER_ASKS = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>{{ m['content'] }}<|eot_id|>{% endfor %}"
)
IN_PARTS = (
    "{% for m in messages %}{{ m['role'] | upper + '>' }}{% for p in m['content'] %}{{ '<image>\n' if p['type'] == "
    "'image' else p['text'] }}{% endfor %}{{ '<|eot_id|>' }}{% endfor %}{{ 'ASSISTANT>' if add_generation_prompt }}"
)
LLAVA_HF = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}{% for p in "
    "m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for p in m['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ p['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
THINKS = CHATML.replace("+ m['content'] +", "+ m['content'].split('</think>')[-1] +")

USED = {
    "llama 3": (LLAMA_3, "<|eot_id|>"),
    "always asks": (ALWAYS_ASKS, "<|eot_id|>"),
    "chatml": (CHATML, "<|im_end|>"),
    "own system text": (OWN_SYSTEM, "<|im_end|>"),
    "llama 2": (LLAMA_2, "</s>"),
    "never asks": (NEVER_ASKS, "<|eot_id|>"),
    "in parts": (IN_PARTS, "<|eot_id|>"),
}
"""Templates that are used as they are, and the end token of their answers."""
LAST_DIFFERS = CHATML.replace(
    "m['content'] +", "('<think></think>' if loop.last and m['role'] == 'assistant' else '') + m['content'] +"
)
REFUSED = {
    "no template": (None, "<|eot_id|>", "there is no chat template"),
    "last answer differs": (LAST_DIFFERS, "<|im_end|>", "once and"),
    "clock": ("{{ strftime_now('%d') }}" + LLAMA_3, "<|eot_id|>", "asks for the time"),
    "broken": ("{% for", "<|eot_id|>", "cannot be rendered"),
    "raises": ("{{ raise_exception('no') }}", "<|eot_id|>", "cannot be rendered"),
    "other image place": (
        IN_PARTS.replace("<image>\n", "<|image|>"), "<|eot_id|>", "a question about an image is",
    ),
    "no end": (CHATML.replace("<|im_end|>", ""), "<|im_end|>", "no special token"),
    "later answers differ": (
        LLAMA_3.replace("m['content'] | trim", "(m['content'] | trim) ~ (loop.index if loop.index > 3 else '')"),
        "<|eot_id|>", "cannot be used",
    ),
    "texts are lost": ("{{ messages[-1]['content'] }}<|eot_id|>", "<|eot_id|>", "cannot be used"),
    "another end than generation's": (CHATML, "<|eot_id|>", "so no answer would end"),
}  # fmt: skip
"""Templates that are refused, and words of the reason."""
TEXT = {"vocab_size": 448, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": IMAGE_SIZE, "patch_size": PATCH,
}  # fmt: skip
OTHER_PARTS = {
    "phi3": ({"text_config": Phi3Config(**TEXT, pad_token_id=0)}, "language model of type 'phi3'"),
    "mistral, sliding": ({"text_config": MistralConfig(**TEXT, num_key_value_heads=4)}, "sliding window"),
    "siglip": ({"vision_config": SiglipVisionConfig(**TOWER)}, "vision tower of type 'siglip_vision_model'"),
}


def byte_tokenizer(end, template=None, size=420):
    """Return a byte-level tokenizer as Llama 3's: a start token of its own, no `</s>` unless it is `end`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = ["USER: ASSISTANT: What is it? a red circle, question one and answer zero"] * 20
    special = list(dict.fromkeys([START, end, PAD, IMAGE, "<|im_end|>", "<|eot_id|>"]))
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=end, pad_token=PAD, chat_template=template
    )


def write_base(folder, template, end, **parts):
    """Write a random LLaVA in llava-hf layout with such a tokenizer; `parts` replace its language model or tower."""
    tokenizer = byte_tokenizer(end, template)
    ids = dict(
        zip(
            ("bos_token_id", "eos_token_id", "pad_token_id"),
            tokenizer.convert_tokens_to_ids([START, end, PAD]),
            strict=True,
        )
    )
    known = {"text_config": LlamaConfig(**TEXT, **ids), "vision_config": CLIPVisionConfig(**TOWER, projection_dim=32)}
    config = LlavaConfig(**known | parts, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE), image_seq_length=16)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    pixels = {"image_processor_type": "CLIPImageProcessor", "crop_size": crop, "size": {"shortest_edge": IMAGE_SIZE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels), encoding="utf-8")
    return folder
