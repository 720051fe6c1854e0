"""The processor: chat messages, or texts with `<image>` places and images, in; padded model inputs out.

Shape suffixes: B rows, N tokens of the longest row, I images of all rows, S pixels a side.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from dynamic_llava.model.images import MultiModalData
from dynamic_llava.processing import images as image_io
from dynamic_llava.processing.base_template import Ends, check_rendering, find_format
from dynamic_llava.processing.folder import (
    load_tokenizer,
    read_ends,
    read_settings,
    read_template,
    template_of,
    write_json,
)
from dynamic_llava.processing.image_processor import DynamicLlavaImageProcessor, ImageInput, as_tensors
from dynamic_llava.processing.inputs import (
    PADDING_SIDES,
    TextOptions,
    merge,
    pad_rows,
    read_images,
    read_texts,
    sort_inputs,
    tensors_of,
)
from dynamic_llava.processing.messages import Message, chat_prompt, named_images, read_chats
from dynamic_llava.processing.prompts import (
    IMAGE_PLACE,
    EncodedConversation,
    PromptFormat,
    Turn,
    conversation_prompt,
    encode_conversation,
    encode_prompt,
)
from dynamic_llava.projectors import DEFAULT, STRATEGIES, tokens_of


class DynamicLlavaProcessor(ProcessorMixin):
    """Turns chat messages, or texts, and images into the model's inputs; built on a fast transformers tokenizer.

    One of transformers' processors: `AutoProcessor`, `pipeline` and `push_to_hub` know it. Unlike LlavaProcessor it
    always pads images to a square and tokenises the pieces between images one by one, as LLaVA-1.5 itself does.

    Args:
        tokenizer: a fast tokenizer (transformers' `PreTrainedTokenizerFast` or a subclass).
        image_size: side S of the square that the vision tower sees; a multiple of `patch_size`.
        patch_size: side of one patch.
        image_token_id: the id that stands for every image token; the tokenizer's `<image>` when not given.
        feature_select: "default" (patches only, LLaVA-1.5) or "full" (the class token as well).
        projector: the model's projector, by which it is known how many tokens an image becomes.
        added_tokens: how many more the model's method puts behind them (VoCo-LLaMA).
        image_mean, image_std: normalisation per channel; the padding colour follows from the mean.
        chat_template: the base's own jinja template; None is the tokenizer's. LLaVA-1.5 has vicuna_v1, whatever it is.
        ends: where generation stops; None is at the tokenizer's end token.
    Raises ValueError when sizes do not fit, when no image token is known, and for a template or an end token that
    cannot be used (see `base_template.find_format`).
    """

    image_token = IMAGE_PLACE

    def __init__(
        self,
        tokenizer: Any,
        image_size: int,
        patch_size: int,
        *,
        image_token_id: int | None = None,
        feature_select: str = "default",
        projector: str = DEFAULT,
        added_tokens: int = 0,
        image_mean: Sequence[float] = image_io.CLIP_MEAN,
        image_std: Sequence[float] = image_io.CLIP_STD,
        chat_template: str | None = None,
        ends: Ends | None = None,
    ) -> None:
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise ValueError(f"image_size={image_size} is not a positive multiple of patch_size={patch_size}")
        if feature_select not in STRATEGIES:
            raise ValueError(f"feature_select={feature_select!r} is not known; choose 'default' or 'full'")
        if image_token_id is None:
            image_token_id = tokenizer.get_vocab().get(IMAGE_PLACE)
        if image_token_id is None:
            raise ValueError(f"the tokenizer has no {IMAGE_PLACE!r}; give image_token_id (LLaVA-1.5: 32000)")
        # ProcessorMixin's own constructor would only set the attributes below, and take away chat_template's fixedness.
        self.tokenizer = tokenizer
        self.image_processor = DynamicLlavaImageProcessor(image_size, image_mean, image_std)
        self.patch_size = patch_size
        self.image_token_id = int(image_token_id)
        self.feature_select = feature_select
        self.make_tokens(projector, added_tokens)
        self.prompt_format = find_format(tokenizer, chat_template or template_of(tokenizer), ends)
        """How conversations are written: vicuna_v1 for LLaVA-1.5."""

    def make_tokens(self, projector: str, added_tokens: int) -> None:
        """Make as many tokens of an image as this projector does, and so many more."""
        made = tokens_of(self.image_size, self.patch_size, self.feature_select, projector)
        self.projector, self.added_tokens, self.tokens_per_image = projector, added_tokens, made + added_tokens

    @property
    def image_size(self) -> int:
        """Return the side S in pixels of what the vision tower sees."""
        return self.image_processor.image_size

    @property
    def image_mean(self) -> tuple[float, ...]:
        """Return the mean per channel that is subtracted."""
        return self.image_processor.image_mean

    @property
    def image_std(self) -> tuple[float, ...]:
        """Return the standard deviation per channel that is divided by."""
        return self.image_processor.image_std

    @property
    def chat_template(self) -> str:  # type: ignore[override]
        """Return what `apply_chat_template` writes as a jinja template: vicuna_v1, or the base's own; fixed."""
        return self.prompt_format.template

    @property
    def end_token_id(self) -> int:
        """Return the id of the token that ends an answer."""
        return int(self.tokenizer.convert_tokens_to_ids(self.prompt_format.end_token))

    @property
    def pad_token_id(self) -> int:
        """Return the id at padding places; masked everywhere, so any id but the image token's will do."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.unk_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0 if self.image_token_id != 0 else 1

    @property
    def model_input_names(self) -> list[str]:
        """Return the names of what a call makes."""
        return ["input_ids", "attention_mask", "pixel_values"]

    @property
    def vision_feature_select_strategy(self) -> str:
        """Return `feature_select`, by the name that transformers' LlavaProcessor has for it."""
        return self.feature_select

    @property
    def num_additional_image_tokens(self) -> int:
        """Return 1, CLIP's class token, which feature_select "default" takes away again, and those that are added."""
        return 1 + self.added_tokens

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Return the names of the parts, as ProcessorMixin reads them from other constructors than ours."""
        return ["image_processor", "tokenizer"]

    def __call__(self, *inputs: Any, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Return `input_ids` and `attention_mask` (B, N) int64 and `pixel_values` (I, 3, S, S) float32.

        Args:
            inputs: images and text by place, in either order; a single text alone, too.
            images: one, a flat list in row order, or one list per row, of Pillow images, paths, arrays or tensors of 8
                bits, or bytes of files.
            text: one finished prompt or several; each `<image>` becomes `tokens_per_image` image tokens.
            kwargs: those of transformers' LlavaProcessor, by name or in `text_kwargs` and `images_kwargs`: padding
                (True unless said otherwise), padding_side (the tokenizer's), max_length, truncation,
                pad_to_multiple_of, add_special_tokens, return_attention_mask, return_mm_token_type_ids, and
                return_tensors ("pt" unless said otherwise, "np", or None for lists).
        Keys of what is not given are absent. Raises ValueError when the images do not match the `<image>` places, for
        an argument that is unknown or asks for what is not made here, and where truncation would cut an image.
        """
        images, text = sort_inputs(inputs, images, text)
        if text is None and images is None:
            raise ValueError("neither text nor images were given; give at least one of them")
        options, settings = merge(self, kwargs)
        texts = read_texts(text)
        self.image_processor.check_fixed(settings)
        flat = read_images(texts, images)
        rows = None
        if texts is not None:
            rows = [encode_prompt(*self._encoding(row), options.add_special_tokens) for row in texts]
        return self._features(rows, flat, options)

    def _features(
        self,
        rows: list[list[int]] | None,
        images: Sequence[ImageInput],
        options: TextOptions,
        masks: Sequence[Sequence[int]] | None = None,
    ) -> BatchFeature:
        """Return what a call makes of rows of ids, images, and of one mask per row (`assistant_masks`), if any."""
        features: dict[str, Any] = {}
        if rows is not None:
            rows = [options.cut(row, self.image_token_id) for row in rows]
            columns = {"input_ids": rows}
            if options.return_attention_mask:
                columns["attention_mask"] = [[1] * len(row) for row in rows]
            if options.return_mm_token_type_ids:
                columns["mm_token_type_ids"] = [[int(token == self.image_token_id) for token in row] for row in rows]
            if masks is not None:
                columns["assistant_masks"] = [options.cut(list(mask), -1) for mask in masks]
            width = options.width([len(row) for row in rows])
            for name, column in columns.items():
                filler = self.pad_token_id if name == "input_ids" else 0
                features[name] = tensors_of(pad_rows(column, filler, options, width), options)
        if images:
            features["pixel_values"] = as_tensors(self.preprocess_images(images), options.return_tensors)
        return BatchFeature(features)

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the text of one conversation or several, or with tokenize=True the model's inputs.

        The text is vicuna_v1's for LLaVA-1.5, and what its own chat template writes for another base.

        A conversation is a list of messages: an optional "system", then "user" and "assistant" by turns. A message's
        content is a text, or a list of {"type": "text", "text": ...} and {"type": "image", "image": ...}, the image
        being any that `__call__` takes (which "path" and "url" may hold too). Parts stand on lines of their own.

        Args:
            conversation: the messages, or a list of such lists, which become the rows of a batch.
            chat_template: no other than the checkpoint's own, which it was trained on.
            add_generation_prompt: ask for an answer (vicuna_v1: end in `ASSISTANT:`).
            continue_final_message: leave the last answer open for the model to go on with.
            tokenize: return model inputs instead of text; images are read then.
            return_dict: with tokenize=True, all inputs as `__call__` returns them; False gives `input_ids` alone.
            return_assistant_tokens_mask: with both, `assistant_masks` (B, N) as well: 1 at answers and end tokens.
            processor_kwargs, kwargs: arguments of `__call__`.
        Raises ValueError for messages that the format has no place for, and for images that are named nowhere.
        """
        if chat_template not in (None, self.chat_template):
            raise ValueError(
                "chat_template is fixed: a checkpoint is asked as it was trained (LLaVA-1.5: vicuna_v1); leave it out, "
                "or write another text yourself"
            )
        options = {**(processor_kwargs or {}), **kwargs}
        for name in ("tools", "documents", "load_audio_from_video", "sanitize_control_tokens"):
            if options.pop(name, None):
                raise ValueError(f"{name} has no place in a LLaVA conversation; leave it out")
        if return_assistant_tokens_mask and (continue_final_message or not (tokenize and return_dict)):
            raise ValueError(
                "return_assistant_tokens_mask needs tokenize=True and return_dict=True, and a whole last message "
                "(continue_final_message=False)"
            )
        batched, chats = read_chats(conversation)
        ending = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        texts = [chat_prompt(chat, self.prompt_format, **ending) for chat in chats]
        for chat in chats:
            self.conversation_prompt(chat.turns, chat.system)
        if not tokenize:
            options.pop("return_tensors", None)  # which transformers' own tools give always
            if return_dict or options:
                named = ", ".join(["return_dict"] * return_dict + list(options))
                raise ValueError(f"{named} have no use without tokenize=True; set it")
            return texts if batched else texts[0]
        text_options, settings = merge(self, options)
        self.image_processor.check_fixed(settings)
        images = read_images(texts, [named_images(chat, row) for row, chat in enumerate(chats)])
        rows = [encode_prompt(*self._encoding(text), text_options.add_special_tokens) for text in texts]
        masks = None
        if return_assistant_tokens_mask:
            encoded = [self.encode_conversation(chat.turns, system=chat.system) for chat in chats]
            masks = [one.answer_mask(len(row)) for one, row in zip(encoded, rows, strict=True)]
        inputs = self._features(rows, images, text_options, masks)
        return inputs if return_dict else inputs["input_ids"]

    def encode_conversation(
        self, turns: Sequence[Turn], max_length: int | None = None, system: str | None = None
    ) -> EncodedConversation:
        """Return ids, labels and answers of a training sample (see `prompts.encode_conversation`).

        `system` replaces the format's own system text; None keeps it. Raises RenderingError where a base's own chat
        template has no place for it, or writes this conversation in another way than others.
        """
        self.conversation_prompt(turns, system)
        image = self.tokens_per_image, self.image_token_id
        return encode_conversation(
            self.tokenizer, turns, *image, max_length=max_length, system=system, form=self.prompt_format
        )

    def conversation_prompt(self, turns: Sequence[Turn], system: str | None = None) -> str:
        """Return the text of (question, answer) turns as this checkpoint was trained; None asks for the last answer.

        Raises RenderingError where a base's own chat template writes this conversation in another way than others.
        """
        text = conversation_prompt(turns, system, self.prompt_format)
        check_rendering(self.tokenizer, self.prompt_format, turns, system, text)
        return text

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a finished prompt text, images as all of their tokens (see `prompts.encode_prompt`)."""
        return encode_prompt(*self._encoding(text))

    def _encoding(self, text: str) -> tuple[Any, str, int, int, PromptFormat]:
        return self.tokenizer, text, self.tokens_per_image, self.image_token_id, self.prompt_format

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Return how many tokens each image of `image_sizes` becomes, one whole image each; servers ask for it."""
        if image_sizes is None:
            return MultiModalData()
        merge(self, kwargs)
        images = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.tokens_per_image] * images, num_image_patches=[1] * images)

    def preprocess_images(self, images: Sequence[ImageInput]) -> Tensor:
        """Return (I, 3, S, S) float32 pixel values of Pillow images or image files."""
        return self.image_processor.pixels(images)

    def pad(self, rows: Sequence[Sequence[int]], padding_side: str = "left") -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, both (B, N) int64, of rows of unequal length."""
        if padding_side not in PADDING_SIDES:
            raise ValueError(f"padding_side={padding_side!r} is not known; choose 'left' or 'right'")
        if not rows:
            raise ValueError("an empty list of texts was given; give at least one")
        return dict(self._features([list(row) for row in rows], (), TextOptions(padding_side=padding_side)))

    def decode(self, ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """Return the text of one row of token ids (a tensor or a list); image tokens are left out."""
        ids = [token for token in _as_list(ids) if token != self.image_token_id]
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(self, rows: Any, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """Return the text of every row; see `decode`."""
        return [self.decode(row, skip_special_tokens, **kwargs) for row in rows]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Return the text of every row of what `generate` returned; transformers' pipeline asks for it."""
        return self.batch_decode(generated_outputs, skip_special_tokens, **kwargs)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "DynamicLlavaProcessor":  # type: ignore[override]
        """Load from a checkpoint folder (or hub name): tokenizer files, config.json and preprocessor_config.json.

        Without config.json, processor_config.json (written by `save_pretrained`) gives the sizes. Images are always
        padded to a square, also where an old preprocessor_config.json crops instead: LLaVA-1.5 was trained so.
        `kwargs` are those of transformers' AutoTokenizer, hub arguments such as `revision` and `token` included; the
        tokenizer pads on the left unless padding_side says otherwise.
        Raises FileNotFoundError when the sizes are nowhere to be found, and ValueError when two files contradict.
        """
        settings = read_settings(str(folder), kwargs)
        tokenizer = load_tokenizer(folder, **{"padding_side": "left", **kwargs})
        template, ends = read_template(folder, tokenizer, kwargs), read_ends(folder, kwargs)
        try:
            return cls(tokenizer, **settings, chat_template=template, ends=ends)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    def save_pretrained(self, folder: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write the tokenizer, preprocessor_config.json, processor_config.json and chat_template.jinja.

        transformers' own LlavaProcessor reads them too. `kwargs` belong to push_to_hub=True.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "preprocessor_config.json", self.image_processor.to_dict())
        if getattr(self.tokenizer, "legacy", None) is not None:
            # LlamaTokenizer forgets this flag when it is saved, and a new one takes False: other ids behind "</s>".
            self.tokenizer.init_kwargs["legacy"] = self.tokenizer.legacy
        return super().save_pretrained(str(folder), push_to_hub=push_to_hub, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return what processor_config.json holds."""
        values = {
            "processor_class": type(self).__name__,
            "image_token": IMAGE_PLACE,
            "num_additional_image_tokens": self.num_additional_image_tokens,
            "patch_size": self.patch_size,
            "vision_feature_select_strategy": self.feature_select,
        }
        return values if self.projector == DEFAULT else {**values, "projector": self.projector}


def _as_list(ids: Any) -> list[int]:
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)
