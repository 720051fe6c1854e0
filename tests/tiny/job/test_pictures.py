"""Pictures of a job whose answers are few, short or empty: what can be drawn is drawn, and the job goes on."""

from PIL import Image

from dynamic_llava.tiny.job.pictures import keep_rate_by_word
from dynamic_llava.viz.greyed_answers import GreyedAnswer


def answered(*words):
    return GreyedAnswer(Image.new("RGB", (8, 8)), [0], "Describe.", list(words), [True] * len(words))


def test_answers_that_repeat_no_word_and_answers_without_one(tmp_path):
    assert [path.name for path in keep_rate_by_word(tmp_path, [answered("a", "b"), answered("c")])] == [
        "keep_rate_by_word.png"
    ]
    assert keep_rate_by_word(tmp_path, [answered(), answered()]) == []
