"""The two words that LLaVA-1.5 lacks in llava-hf's eyes: an id for <image>, and one for padding.

The original marks the place of an image with -200, outside of its vocabulary. llava-hf gives <image> and <pad> the next
two ids and pads the tables of words to a multiple of 64 rows: 32000 becomes 32064. The same is done here; but where
llava-hf draws the new rows around the mean of the old ones, they are that mean here, so that the same source gives
the same checkpoint. A head's mean row never has the highest logit, so no new id is ever the most likely one.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AddedToken, LlamaTokenizer, PreTrainedTokenizerFast

from dynamic_llava.checkpoints.layouts import read_json
from dynamic_llava.files import brief, brief_text
from dynamic_llava.model import DynamicLlavaConfig
from dynamic_llava.processing.base_template import Ends, find_format
from dynamic_llava.processing.folder import load_tokenizer, panics_as_errors, read_template

IMAGE_WORD, PAD_WORD = "<image>", "<pad>"
ROWS_MULTIPLE = 64
_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Vocabulary:
    """Ids and table size of the new checkpoint, and its tokenizer where the source has one."""

    rows: int
    image_id: int
    pad_id: int | None
    tokenizer: Any = None
    chat_template: str | None = None
    """The source's own template; the tokenizer's where it is None."""
    ends: Ends | None = None
    """Where generation stops; at the tokenizer's end token where it is None."""


def read_tokenizer(folders: list[Path], original: bool) -> Any:
    """Return the tokenizer of the first folder that holds one; None where none does.

    `original`: the tokenizer is LLaVA's own, whose `legacy` flag counts as transformers 4 read it (missing: true).
    Raises ValueError where the files cannot be read.
    """
    folder = _folder_of_tokenizer(folders)
    if folder is None:
        return None
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    try:
        if not original:
            return load_tokenizer(folder)
        with panics_as_errors():
            if (folder / "tokenizer.model").is_file():
                legacy = settings.get("legacy", True)
                found = LlamaTokenizer.from_pretrained(folder, legacy=legacy, trust_remote_code=False)
            else:
                found = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
            found("a")  # some settings are read only now
        return found
    except ImportError as error:
        raise ValueError(f'reading {folder / "tokenizer.model"} needs: pip install "dynamic-llava[convert]"') from error
    except Exception as error:  # transformers and tokenizers raise what they like for a damaged file
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({brief_text(error)}); get its files again"
        ) from None


def with_prompts(vocabulary: Vocabulary, folders: list[Path], ends: Ends | None) -> Vocabulary:
    """Return the vocabulary with the chat template and the end of answers that its tokenizer's folder brings.

    Raises ValueError where no conversation can be written with them (see `base_template.find_format`).
    """
    folder = _folder_of_tokenizer(folders)
    if folder is None:
        return vocabulary
    template = read_template(folder, vocabulary.tokenizer, {})
    try:
        find_format(vocabulary.tokenizer, template, ends)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return replace(vocabulary, chat_template=template, ends=ends)


def _folder_of_tokenizer(folders: list[Path]) -> Path | None:
    return next((folder for folder in folders if any((folder / name).is_file() for name in _FILES)), None)


def extend_vocabulary(values: dict[str, Any], rows: int, tokenizer: Any, pad_id: int | None) -> Vocabulary:
    """Return where an original LLaVA of `rows` words gets <image> and <pad>; the tokenizer gets them too.

    A word or id that is there already keeps its place. `values` is config.json, `pad_id` the source's own.
    Without a tokenizer nobody needs <pad>. Raises ValueError where the tokenizer knows more words than the model.
    """
    known = tokenizer.get_vocab() if tokenizer is not None else {}
    if known and max(known.values()) >= rows and not {IMAGE_WORD, PAD_WORD} & set(known):
        raise ValueError(
            f"the tokenizer knows {max(known.values()) + 1} words and the model {rows}; they are not of one checkpoint"
        )
    image_id = values.get("image_token_index", values.get("image_token_id"))
    if type(image_id) not in (int, type(None)) or (image_id or 0) < 0:
        raise ValueError(f"config.json has the image token {brief(image_id)}; give a token id, or take it out")
    if tokenizer is None:
        image_id = rows if image_id is None else image_id
    else:
        if image_id is not None and known.get(IMAGE_WORD) != image_id:
            raise ValueError(
                f"config.json has the image token {image_id} and the tokenizer's {IMAGE_WORD} is "
                f"{known.get(IMAGE_WORD, 'not there')}; take the image token out of config.json, or correct it"
            )
        words = [word for word in (IMAGE_WORD, PAD_WORD) if word not in known]
        tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in words])
        tokenizer.pad_token = PAD_WORD
        image_id, pad_id = (tokenizer.convert_tokens_to_ids(word) for word in (IMAGE_WORD, PAD_WORD))
    largest = max(image_id, pad_id or 0)
    if largest >= rows:
        rows = -(-(largest + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return Vocabulary(rows, image_id, pad_id, tokenizer)


def keep_vocabulary(config: DynamicLlavaConfig, tokenizer: Any) -> Vocabulary:
    """Return the vocabulary of a checkpoint that has its <image> already. ValueError where its files contradict."""
    rows, image_id = config.text_config.vocab_size, config.image_token_id
    if not 0 <= image_id < rows:
        raise ValueError(f"config.json has image_token_index {image_id}, which is outside of its {rows} words")
    if tokenizer is not None and tokenizer.get_vocab().get(IMAGE_WORD, image_id) != image_id:
        raise ValueError(
            f"the tokenizer's {IMAGE_WORD} is {tokenizer.get_vocab()[IMAGE_WORD]} and config.json's image_token_index "
            f"is {image_id}; correct one of the two"
        )
    return Vocabulary(rows, image_id, config.text_config.pad_token_id, tokenizer)
