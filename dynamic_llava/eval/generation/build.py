"""Item lists of LVIS-VQA and ShareGPT4V-VQA, made as the paper describes them (A.4.3, A.4.4); no torch here.

The paper publishes how long answers are and how many items there are, not the lists, the seed, or how images were
chosen; so a list made here is another draw from the same data. Its lengths in words do not fit its token means (Table
8): 300 words are about 400 tokens, but dialogues of more than 300 words are said to have 351 on average, and captions
of no less than 300 words 1555. Of dialogues the paper gives an average, so there is no threshold by default and the
mean is printed; `--min-words` and `--min-tokens` try others.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from dynamic_llava.eval.reading import PATH, TEXTS, Kind, fields_of, typed
from dynamic_llava.eval.writing import write_json

IMAGE_PLACE = "<image>"
IMAGES = Kind("the path of an image, or a list of them", lambda value: value == [] or TEXTS.fits(value))


@dataclass(frozen=True)
class ItemKind:
    """One benchmark's items as the paper describes them: how many, how long, of how many rounds."""

    prefix: str
    """Begins their ids."""
    items: int
    rounds: int
    """Least number of rounds; 1 means exactly one."""
    words: int
    """Least number of words of all answers together."""
    tokens: tuple[int, int]
    """Means of Table 8: text (system text included, image apart) and output."""

    def describe(self) -> str:
        """Return the defaults as text."""
        words = f", at least {self.words} words" if self.words else ""
        return f"{self.items}{words}{f', at least {self.rounds} rounds' if self.rounds > 1 else ''}"


KINDS = {
    "single": ItemKind("lvis", 1000, 1, 101, (56, 159)),
    "multi": ItemKind("lvis", 1000, 8, 0, (205, 351)),
    "sharegpt4v": ItemKind("sharegpt4v", 178, 1, 300, (51, 1555)),
}
"""Answers "over 100 words", "more than seven rounds", captions of "no less than 300 words"."""


@dataclass(frozen=True)
class BuildOptions:
    """How items are chosen; None is the paper's value, where it gives one.

    ValueError for numbers and combinations without sense.
    """

    kind: Literal["single", "multi", "sharegpt4v"]
    source: Path
    output: Path
    exclude: tuple[Path, ...] = ()
    n: int | None = None
    seed: int = 0
    min_words: int | None = None
    min_tokens: int | None = None
    min_rounds: int | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name in ("n", "min_words", "min_tokens", "min_rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not possible; give 1 or more")
        if self.min_words is not None and self.min_tokens is not None:
            raise ValueError("min_words and min_tokens are two units of one threshold; give one of them")
        if self.min_tokens is not None and self.tokenizer is None:
            raise ValueError("min_tokens needs a tokenizer to count with; give --tokenizer CHECKPOINT")
        if self.min_rounds is not None and self.kind != "multi":
            raise ValueError(f"min_rounds belongs to kind multi; an item of kind {self.kind} has one round")
        if self.min_rounds == 1:
            raise ValueError("min_rounds=1 is not possible for kind multi; give 2 or more, or build kind single")


def build(options: BuildOptions) -> str:
    """Write the item list and return a report.

    Raises FileNotFoundError for a missing file, and ValueError for a broken one and for fewer candidates than items.
    """
    kind, count = KINDS[options.kind], _token_counter(options.tokenizer)
    excluded = {name for path in options.exclude for name in _image_names(path)}
    passed: Counter[str] = Counter()
    candidates = []
    for number, sample in enumerate(_samples(options.source)):
        item = _item(sample, f"{options.source}, sample {number}")
        reason = _reason_against(item, options, kind, excluded, count)
        passed[reason] += 1
        if not reason:
            candidates.append(item)
    # Sorted by all that an item is: the order of the source decides nothing, nor do ids that stand twice.
    candidates.sort(key=lambda item: json.dumps([str(item["source"]), item["image"], item["rounds"]]))
    wanted = kind.items if options.n is None else options.n
    if len(candidates) < wanted:
        raise ValueError(
            f"{options.source} has {len(candidates)} samples that fit, {wanted} are wanted; lower --n or a threshold "
            f"({_counts(passed)})"
        )
    places = sorted(random.Random(options.seed).sample(range(len(candidates)), wanted))
    chosen = [candidates[place] for place in places]
    several = options.kind == "multi"
    write_json(
        options.output, [_as_item(item, kind, number, several) for number, item in enumerate(chosen, 1)], indent=1
    )
    return _report(options, kind, chosen, passed, count)


def _item(sample: Any, place: str) -> dict[str, Any]:
    """Return id, image and (question, answer) rounds of a sample; no rounds where it is no such dialogue."""
    if not isinstance(sample, dict) or not isinstance(sample.get("conversations"), list):
        raise ValueError(f"{place} has no list of conversations; give a file in LLaVA's format")
    image, messages = sample.get("image"), sample["conversations"]
    texts, fits = [], PATH.fits(image) and len(messages) % 2 == 0
    for number, message in enumerate(messages):
        speaker, text = (message.get("from"), message.get("value")) if isinstance(message, dict) else (None, None)
        if not isinstance(text, str):
            raise ValueError(f"{place}, message {number} has no text")
        fits &= speaker == ("gpt" if number % 2 else "human") and bool(text.replace(IMAGE_PLACE, "").strip())
        fits &= IMAGE_PLACE not in text or number == 0
        texts.append(text)
    rounds = list(zip(texts[::2], texts[1::2], strict=True)) if fits else []
    return {"source": sample.get("id", ""), "image": image, "rounds": rounds}


def _reason_against(item: dict[str, Any], options: BuildOptions, kind: ItemKind, excluded: set[str], count: Any) -> str:
    """Return why a sample is no candidate, "" when it is one."""
    rounds = item["rounds"]
    if not rounds:
        return "no dialogue about one image"
    if Path(item["image"]).name in excluded:
        return "image excluded"
    least = kind.rounds if options.min_rounds is None else options.min_rounds
    if len(rounds) < least or (options.kind != "multi" and len(rounds) > 1):
        return "other number of rounds"
    if options.min_tokens is not None:
        short = sum(count(rounds)[1:]) < options.min_tokens
    else:
        words = kind.words if options.min_words is None else options.min_words
        short = sum(len(answer.split()) for _, answer in rounds) < words
    return "answers too short" if short else ""


def _as_item(item: dict[str, Any], kind: ItemKind, number: int, several: bool) -> dict[str, Any]:
    """Return an item in the published scripts' format; `source` is the sample's own id."""
    asked, answers = map(list, zip(*item["rounds"], strict=True))
    first = asked[0].replace(IMAGE_PLACE, "").strip()
    asked[0] = f"{IMAGE_PLACE}\n{first}"
    return {
        "id": f"{kind.prefix}_{number}",
        "image": item["image"],
        "question": asked if several else asked[0],
        "answer": answers if several else answers[0],
        "source": item["source"],
    }


def _samples(path: Path) -> Iterator[Any]:
    from dynamic_llava.data.json_stream import stream_list

    with path.open("rb") as file:
        yield from stream_list(file, str(path))


def _image_names(path: Path) -> Iterator[str]:
    """Yield the base names of all images of a training file; samples of text alone have none."""
    for number, sample in enumerate(_samples(path)):
        images = fields_of(sample, {}, f"{path}, sample {number}").get("image") or []
        images = [images] if isinstance(images, str) else images
        yield from (Path(name).name for name in typed(images, IMAGES, f"{path}, sample {number}: 'image'"))


def _token_counter(tokenizer: str | None) -> Any:
    """Return a function that gives text and output tokens of rounds, as the benchmark feeds them; None without one."""
    if tokenizer is None:
        return None
    from dynamic_llava.eval.generation.dialogues import encode_dialogue
    from dynamic_llava.processing.folder import load_tokenizer

    loaded = load_tokenizer(tokenizer)

    def count(rounds: Sequence[tuple[str, str]]) -> tuple[int, int]:
        first = rounds[0][0].replace(IMAGE_PLACE, "").strip()
        # No tokens per image, so that text alone is counted.
        encoded = encode_dialogue(loaded, [(first, rounds[0][1]), *rounds[1:]], 0, -1)
        return sum(len(one.prompt) for one in encoded), sum(len(one.answer) - 1 for one in encoded)

    return count


def _report(options: BuildOptions, kind: ItemKind, chosen: Sequence[dict[str, Any]], passed: Any, count: Any) -> str:
    words = fmean(sum(len(answer.split()) for _, answer in item["rounds"]) for item in chosen)
    rounds = fmean(len(item["rounds"]) for item in chosen)
    lines = [
        f"{len(chosen)} items in {options.output}, drawn with seed {options.seed} ({_counts(passed)})",
        f"means: {rounds:.2f} rounds, {words:.1f} words of answers",
    ]
    if count is None:
        lines.append(
            f"tokens were not counted (--tokenizer); Table 8 has text {kind.tokens[0]}, output {kind.tokens[1]}"
        )
    else:
        text, output = (fmean(column) for column in zip(*(count(item["rounds"]) for item in chosen), strict=True))
        lines.append(f"tokens, mean:    text {text:8.1f}   output {output:8.1f}")
        lines.append(f"Table 8:         text {kind.tokens[0]:8.1f}   output {kind.tokens[1]:8.1f}")
    if not options.exclude:
        lines.append("no image was excluded; the paper has none of its models' training images (--exclude)")
    lines.append("the paper's own item list, seed and choice of images are not published")
    return "\n".join(lines)


def _counts(passed: Any) -> str:
    reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(passed.items()) if reason)
    return f"{sum(passed.values())} samples, {passed['']} fit" + (f"; {reasons}" if reasons else "")
