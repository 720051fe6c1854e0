"""LVIS-VQA (one round, several rounds) and ShareGPT4V-VQA: perplexity and METEOR of long answers (Table 3).

The item lists are not published; `build-lvis` and `build-sharegpt4v` make some as the paper describes them, so its
numbers are a guide, not a target. An item whose image cannot be read is passed over, reported, and not counted among
those that a mean is over. An item without a line is counted as missing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

from dynamic_llava.eval.answers import AnswerLine, one_per_question
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.reading import NAME, NUMBER, NUMBERS, PATH, TEXT, TEXTS, brief, fields_of, read_list, shown
from dynamic_llava.eval.tasks.base import (
    GENERATION,
    LONG_TOKENS,
    SKIPPED,
    DataFile,
    PaperNumbers,
    Said,
    Score,
    Task,
    paper_numbers,
)
from dynamic_llava.eval.tasks.hub import HubData
from dynamic_llava.eval.tasks.questions import ImageFile, Question, missing_answers, unknown_answers

IMAGE_PLACE = "<image>"
LVIS, LVIS_IMAGES = "lvis_vqa", "lvis_vqa/images"
SHARE, SHARE_IMAGES = "sharegpt4v_vqa/sharegpt4v_vqa.json", "sharegpt4v_vqa/images"
SINGLE, SEVERAL = f"{LVIS}/single_round.json", f"{LVIS}/multi_round.json"
BUILD = "`python -m dynamic_llava.eval"
LVIS_SOURCE = "lvis_instruct4v_220k.json (Hugging Face X2FD/LVIS-Instruct4V)"
SHARE_SOURCE = "sharegpt4v_instruct_gpt4-vision_cap100k.json (Hugging Face Lin-Chen/ShareGPT4V)"
COCO = "a folder, or a link to one, in which the items' image paths lie (http://images.cocodataset.org/zips/)"

MEBI, TERA = 2**20, 1e12
COLUMNS: Mapping[str, tuple[str, str, float]] = {
    "output_tokens": ("output_token_length", "tokens", 1),
    "computing_tokens": ("output_cache_length", "tokens", 1),
    "decode_tflop": ("decode_flop", "TFLOP", TERA),
    "kv_mib": ("decode_kv_bytes", "MiB", MEBI),
}
"""Metric -> field of the lines, unit, what it is divided by: "Total -> Computing", "TFLOPs" and "Mem." of Table 3."""
RUNS = {"ppl": "", "meteor": "meteor_"}
"""The two runs behind the columns ("a/b" in Table 3) -> how the names of their fields begin."""


class GenerationTask(Task):
    """A benchmark that a model is measured on by teacher forcing and by its own answers (eval/generation/)."""

    groups = (GENERATION,)
    max_new_tokens = LONG_TOKENS
    skips_unreadable = True
    table_metric = "ppl"
    unreadable_counts_as = "a METEOR of 0"
    items: ClassVar[str]
    """Its list of items (benchmarks of one round: question and answer are text; else both are lists)."""
    images: ClassVar[str]
    several: ClassVar[bool] = False
    """Whether its items have several rounds."""
    round_separator: Literal["official", "template"] = "official"
    """Round separator: how questions after the first are fed (eval/generation/dialogues.py)."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of the task that its answer lines depend on, beside model, items and max_new_tokens."""
        return {"round_separator": self.round_separator} if self.several else {}

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the items in file order; their rounds stand in `extra`.

        Raises ValueError that names the item for one that is broken, or whose id stands twice.
        """
        path, folder = self.path(root, self.items), Path(root) / self.images
        items = read_list(path)
        found: dict[str, Question] = {}
        for number, item in enumerate(items):
            question = self._question(item, f"{path}, item {number}", folder)
            if str(question.id) in found:
                raise ValueError(f"{path}, item {number}: id {brief(question.id)} stands already further up")
            found[str(question.id)] = question
        return list(found.values())

    def _question(self, item: Any, place: str, folder: Path) -> Question:
        said = TEXTS if self.several else TEXT
        fields_of(item, {"id": NAME, "image": PATH, "question": said, "answer": said}, place)
        name, image = item["id"], item["image"]
        sides = [item[side] if self.several else [item[side]] for side in ("question", "answer")]
        if not all(text.strip() for texts in sides for text in texts):
            raise ValueError(f"{place}: a question or answer is blank; each one holds text")
        asked, answers = sides
        if len(asked) != len(answers):
            raise ValueError(f"{place}: {len(asked)} questions have {len(answers)} answers; give one to each")
        if any(IMAGE_PLACE in text for text in (*asked[1:], *answers)):
            raise ValueError(f"{place}: {IMAGE_PLACE} stands outside the first question; an item has one image")
        asked = [asked[0].replace(IMAGE_PLACE, "").strip(), *asked[1:]]
        rounds = [list(pair) for pair in zip(asked, answers, strict=True)]
        return Question(name, "\n".join(asked), ImageFile(folder, image), extra={"rounds": rounds})

    def measure(self, run: Any, asked: Sequence[Any]) -> list[Said]:
        """Return perplexity, METEOR and costs of a batch; `run` and `asked` are those of eval/answering.py."""
        import torch

        from dynamic_llava.eval.generation.measure import measure_dialogues

        rounds = [one.question.extra["rounds"] for one in asked]
        pixels = torch.cat([one.pixels for one in asked])
        separator = self.round_separator if self.several else None
        keys = torch.tensor([one.place for one in asked])
        return measure_dialogues(run, rounds, pixels, separator, keys)

    def can_score(self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None) -> bool:
        """Return whether lines hold what the scores are means of; answers alone have none."""
        return any("ppl" in one.extra or SKIPPED in one.metadata for one in answers)

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return means over the items; perplexity is each item's own, not that of all tokens together.

        Raises ValueError for a line that holds no numbers, an unknown id, an item answered twice, or no item at all.
        """
        said = one_per_question(answers)
        known = [str(question.id) for question in self.questions(root, hub)]
        if unknown := unknown_answers(self.name, said, known):
            raise ValueError(unknown)
        skipped = [name for name, one in said.items() if SKIPPED in one.metadata]
        lines = [one for one in said.values() if SKIPPED not in one.metadata]
        if not lines:
            raise ValueError(f"{self.name}: no item has a perplexity; {len(skipped)} were passed over")
        rounds = "mean_round_" if self.several else ""
        metrics = {
            "ppl": (_mean(lines, f"{rounds}ppl"), "perplexity"),
            "meteor": (_mean(lines, f"{rounds}meteor"), "fraction"),
            "text_tokens": (_mean(lines, "instruct_token_length"), "tokens"),
        }
        for name, (field, unit, scale) in COLUMNS.items():
            for kind, prefix in RUNS.items():
                metrics[f"{name}/{kind}"] = (_mean(lines, prefix + field) / scale, unit)
        missing = missing_answers(said, known)
        counts = {"questions": len(known), "answered": len(lines), "skipped": len(skipped), "missing": len(missing)}
        warnings = [f"items without a line, left out: {shown(missing)}"] if missing else []
        warnings += [f"items whose image cannot be read, left out: {shown(skipped)}"] if skipped else []
        unread = [(one.question_id, one.text) for one in lines if not one.text.strip()]
        numbers = {name: {one.key: _number(one, f"{rounds}{name}") for one in lines} for name in RUNS}
        tallies = {name: tally_of_means(its, graded=False) for name, its in numbers.items()}
        return self.result(metrics, counts, unread, warnings, self._by_round(lines) if self.several else {}, tallies)

    @staticmethod
    def _by_round(lines: Sequence[AnswerLine]) -> dict[str, list[float]]:
        """Return the means of the first, second, ... rounds over the items that have them."""
        for one in lines:
            fields_of(
                dict(one.extra), dict.fromkeys(RUNS, NUMBERS), f"line {one.line}, question {brief(one.question_id)}"
            )
        longest = max(len(one.extra[name]) for one in lines for name in RUNS)
        return {
            f"{name}_by_round": [
                fmean(one.extra[name][place] for one in lines if place < len(one.extra[name]))
                for place in range(longest)
                if any(place < len(one.extra[name]) for one in lines)
            ]
            for name in RUNS
        }


class LvisSingle(GenerationTask):
    """LVIS-VQA, one round: answers of more than 100 words."""

    name = "lvis_single"
    title = "LVIS-VQA (single-round)"
    items, images = SINGLE, LVIS_IMAGES
    files = (
        DataFile(SINGLE, "items", f"{BUILD} build-lvis --kind single --source FILE --output ...` from {LVIS_SOURCE}"),
        DataFile(LVIS_IMAGES, "images", COCO),
    )
    paper: ClassVar[PaperNumbers] = {
        **paper_numbers("ppl", dense=(4.59, 4.39), both=(4.90, 4.76)),
        **paper_numbers("meteor", dense=(0.3103, None), both=(0.3108, None)),
        **paper_numbers("text_tokens", dense=(56, 56), both=(56, 56)),
        **paper_numbers("output_tokens/ppl", dense=(159, 159), both=(159, 159)),
        **paper_numbers("output_tokens/meteor", dense=(173, None), both=(181, None)),
        **paper_numbers("computing_tokens/ppl", dense=(159, 159), both=(84, None)),
        **paper_numbers("computing_tokens/meteor", dense=(173, None), both=(90, None)),
        **paper_numbers("decode_tflop/ppl", dense=(2.75, 5.36), both=(1.52, None)),
        **paper_numbers("decode_tflop/meteor", dense=(2.99, None), both=(1.57, None)),
        **paper_numbers("kv_mib/ppl", dense=(103, 149), both=(63, 90)),
        **paper_numbers("kv_mib/meteor", dense=(91, None), both=(46, None)),
    }
    paper_note = (
        "Tables 3, 8 and 17, items unpublished; its memory is what a device held, more than the keys and values (79.5 "
        "MiB for 159 tokens)"
    )


class LvisMulti(GenerationTask):
    """LVIS-VQA, more than seven rounds about one image, on one cache."""

    name = "lvis_multi"
    title = "LVIS-VQA (multi-round)"
    several = True
    items, images = SEVERAL, LVIS_IMAGES
    files = (
        DataFile(SEVERAL, "items", f"{BUILD} build-lvis --kind multi --source FILE --output ...` from {LVIS_SOURCE}"),
        DataFile(LVIS_IMAGES, "images", COCO),
    )
    paper: ClassVar[PaperNumbers] = {
        **paper_numbers("ppl", dense=(2.97, 2.88), both=(3.17, 3.07)),
        **paper_numbers("meteor", dense=(0.4227, None), both=(0.4251, None)),
        **paper_numbers("text_tokens", dense=(205, 205), both=(205, 205)),
        **paper_numbers("output_tokens/ppl", dense=(351, 351), both=(351, 351)),
        **paper_numbers("output_tokens/meteor", dense=(461, None), both=(522, None)),
        **paper_numbers("computing_tokens/ppl", dense=(351, 351), both=(182, None)),
        **paper_numbers("computing_tokens/meteor", dense=(461, None), both=(260, None)),
        **paper_numbers("decode_tflop/ppl", dense=(6.12, None), both=(3.33, None)),
        **paper_numbers("decode_tflop/meteor", dense=(8.08, None), both=(4.38, None)),
        **paper_numbers("kv_mib/ppl", dense=(222, 331), both=(144, 196)),
        **paper_numbers("kv_mib/meteor", dense=(236, None), both=(140, None)),
    }
    paper_note = "Tables 3, 8 and 17, items unpublished; round separator official; its memory is what a device held"


class ShareGpt4v(GenerationTask):
    """ShareGPT4V-VQA: one round, captions of at least 300 words."""

    name = "sharegpt4v"
    title = "ShareGPT4V-VQA"
    items, images = SHARE, SHARE_IMAGES
    files = (
        DataFile(SHARE, "items", f"{BUILD} build-sharegpt4v --source FILE --output ...` from {SHARE_SOURCE}"),
        DataFile(SHARE_IMAGES, "images", COCO),
    )
    paper: ClassVar[PaperNumbers] = {
        **paper_numbers("ppl", dense=(2.52, 2.43), both=(3.14, 3.10)),
        **paper_numbers("text_tokens", dense=(51, 51), both=(51, 51)),
        **paper_numbers("output_tokens/ppl", dense=(1555, 1555), both=(1555, 1555)),
        **paper_numbers("kv_mib/ppl", dense=(1024, 1489), both=(625, 854)),
    }
    paper_note = (
        "Tables 3 and 8, items unpublished; METEOR has no counterpart: the paper's answers end near 100 tokens, its "
        "references have 1555"
    )


def _mean(lines: Sequence[AnswerLine], field: str) -> float:
    return fmean(_number(one, field) for one in lines)


def _number(line: AnswerLine, field: str) -> float:
    value = line.extra.get(field)
    if not NUMBER.fits(value):
        raise ValueError(
            f"line {line.line}, question {brief(line.question_id)} has {field} {brief(value)}; a run writes a number "
            "there, so score the answer file of a run"
        )
    return float(value)
