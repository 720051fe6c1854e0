"""`dynamic-llava look`: pictures show the record, the page stands alone, texts stay texts, mistakes are told."""

import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dynamic_llava import Conversation, DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.chat.__main__ import main as chat
from dynamic_llava.chat.conversation import CacheUse
from dynamic_llava.chat.terminal import Piece, printable
from dynamic_llava.look.__main__ import main
from dynamic_llava.look.looking import Looked, LookOptions, PatchGrid, SeenTurn, Sight, look, patch_grid
from dynamic_llava.look.page import page_of
from dynamic_llava.look.writing import cache_lines, write_all
from dynamic_llava.methods import METHODS as METHODS_BY_NAME
from dynamic_llava.viz.cache_growth import DENSE_CALCULATED
from dynamic_llava.viz.patches import PatchView
from tests.builders import LEARNED
from tests.pages import HOSTILE, Page, check_alone, pixels_of
from tests.tiny_pipeline import write_checkpoint, write_test_set

SIZES = {"square.png": (64, 64), "portrait.png": (50, 81), "landscape.png": (130, 40)}
METHODS = {"dynamic": {}, "random": {"image_keep_rate": 0.3}, "pyramiddrop": {"layers": (1, 2), "stage_keep_rate": 0.5}}


def check_look(text):
    """A page that stands alone, with pictures and one chart."""
    page = check_alone(text)
    assert page.images and sum("aria-label" in one for one in page.drawings) == 1
    return page


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random model of width 32 whose decisions are mixed, and three pictures of unlike proportions."""
    folder = tmp_path_factory.mktemp("look")
    rng = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Image.fromarray(rng.integers(0, 140, (height, width, 3), dtype=np.uint8)).save(folder / name)
    (folder / "turns.txt").write_text("\ufeffAnd now?\n\n  What else?  \n", encoding="utf-8")
    return SimpleNamespace(folder=folder, model=str(write_checkpoint(folder / "model", seed=0)))


def words_of(methods):
    for name, settings in methods.items():
        yield from ("--method", name)
        for key, value in settings.items():
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            yield from (f"--method.{key.replace('_', '-')}", text)


TWO_METHODS = {name: METHODS[name] for name in ("dynamic", "random")}
QUESTIONS = (HOSTILE, "And now?", "What else?")


@pytest.mark.parametrize("count", [1, 2])
def test_a_page_of_one_or_two_images_shows_the_record(made, count, capsys):
    options = {"images": tuple(made.folder / name for name in list(SIZES)[:count]), "max_new_tokens": 4}
    methods = tuple({"name": name, **settings} for name, settings in METHODS.items())
    found = look(LookOptions(model=made.model, methods=methods, ask="What?", **options))
    page = check_look(page_of(found, cache_lines(found.sights)))
    check_pictures(page, list(SIZES)[:count], {name: asked(made, name, count, ["What?"], 4)[0] for name in METHODS})


def test_what_the_page_of_three_images_shows_is_the_record(made, capsys, tmp_path):
    """Pixel by pixel, for each method and image; words, numbers and texts too; and all the files are there."""
    given = [word for name in SIZES for word in ("--image", str(made.folder / name))]
    questions = ["--ask", HOSTILE, "--turns", str(made.folder / "turns.txt"), "--max-new-tokens", "6"]
    out = tmp_path / "new" / "out"
    code = main(["--model", made.model, *given, *questions, *words_of(TWO_METHODS), "--out", str(out)])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert f"page: {out / 'index.html'}" in said.out
    for name in ("kept", "answers", "cache"):
        assert Image.open(out / f"{name}.png").width > 500
        assert (out / f"{name}.svg").read_text().rstrip().endswith("</svg>")
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    page = check_look((out / "index.html").read_text(encoding="utf-8"))
    numbers = json.loads((out / "look.json").read_text())
    records = {name: asked(made, name, 3, QUESTIONS, 6) for name in TWO_METHODS}
    check_pictures(page, list(SIZES), {name: kept for name, (kept, _) in records.items()})
    check_numbers(numbers, [(name, *record) for name, record in records.items()], said)
    assert "".join(page.texts["h2"]).count(HOSTILE) == 1


def asked(made, name, images, questions, tokens):
    """Return what a conversation of its own keeps of each image, and its answers."""
    model = DynamicLlavaForConditionalGeneration.from_pretrained(made.model).eval()
    processor = DynamicLlavaProcessor.from_pretrained(made.model)
    talk = Conversation(model, processor, method={"name": name, **METHODS[name]}, max_new_tokens=tokens)
    files = [made.folder / one for one in list(SIZES)[:images]]
    answers = [talk.ask(question, files if place == 0 else ()) for place, question in enumerate(questions)]
    return talk.record.rows[0].image_indices, answers


def check_pictures(page, names, kept_by):
    shown = iter(page.images)
    for place, size in enumerate([SIZES[name] for name in names]):
        original, view = pixels_of(next(shown)), PatchView(size, (8, 8))
        numbers_HW = view.numbers(*original.shape[1::-1])
        for name, kept in kept_by.items():
            full = (pixels_of(next(shown)) == original).all(2)
            assert np.array_equal(full, np.isin(numbers_HW, kept[place])), name
            if name != "random":  # a keep probability, or layers that differ
                assert not np.array_equal(pixels_of(next(shown)), original)
    assert next(shown, None) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS_BY_NAME)
def test_every_method_can_be_looked_at(made, name, capsys):
    """What is drawn is what its record says; one that has learned is refused where the checkpoint lacks its weights."""
    options = {"images": (made.folder / "portrait.png",), "ask": "What?", "max_new_tokens": 3}
    looking = LookOptions(model=made.model, methods=({"name": name},), **options)
    if name in LEARNED:
        with pytest.raises(ValueError, match=r"so method .* would be decided at random"):
            look(looking)
        return
    found = look(looking)
    page = check_look(page_of(found, cache_lines(found.sights)))
    original, *shown = (pixels_of(one) for one in page.images)
    numbers = PatchView(SIZES["portrait.png"], (8, 8)).numbers(*original.shape[1::-1])
    assert np.array_equal((shown[0] == original).all(2), np.isin(numbers, found.sights[0].kept[0]))
    assert found.sights[0].use.bytes <= found.sights[0].use.dense_bytes


def check_numbers(numbers, records, said):
    for found, (name, kept, answers) in zip(numbers["methods"], records, strict=True):
        assert found["label"].split()[0] == name and found["kept"] == kept
        assert [turn["kept"] for turn in found["turns"]] == [answer.kept for answer in answers]
        for turn, answer in zip(found["turns"], answers, strict=True):
            assert "".join(piece["text"] for piece in turn["pieces"]).strip() == printable(answer.text)
            assert printable(answer.text) in said.out
        assert found["sparse_lengths"][-1] == answers[-1].use.sparse_tokens
        assert found["dense_lengths"][-1] == answers[-1].use.dense_tokens
        seen = [[1.0] * len(one) for one in found["seen"]]
        assert all(value == 1 for image, one in zip(found["seen"], kept, strict=True) for value in np.array(image)[one])
        assert found["seen"] != seen and (found["chance"] is not None) == (name == "dynamic")
        if found["chance"] is not None:  # top-k: what is kept is most probable
            for chance, one in zip(found["chance"], kept, strict=True):
                dropped = sorted(set(range(64)) - set(one))
                assert min(np.array(chance)[one]) >= max(np.array(chance)[dropped]) and min(chance) >= 0
        assert len(found["sparse_lengths"]) == sum(len(answer.tokens) for answer in answers)


TWO = PatchGrid(2, 2)


def looked(pieces, question="Q", label="dense", name="a.png", grid=TWO):
    """What was seen of one answer, by hand; tokens as long as there are pieces."""
    turn = SeenTurn(question, pieces, [not piece.dropped for piece in pieces[:-1]], len(pieces), "")
    use = CacheUse(3, 4, 30, 40)
    sight = Sight(label, label, [4], [[0, 3]], [[1.0, 0.5, 0.5, 1.0]], None, [turn], [2, 3], [3, 4], use)
    return Looked(name, "cpu", [(name, Image.new("RGB", (9, 7), (90, 80, 70)))], grid, [sight])


def test_hostile_texts_of_model_user_and_files_stay_texts():
    found = looked([Piece(HOSTILE, 0, True), Piece("</article>", 0, False)], HOSTILE, HOSTILE, HOSTILE)
    page = check_look(page_of(found, cache_lines(found.sights)))
    assert "".join(page.texts["answer"]) == f"{HOSTILE}</article>"
    assert "".join(page.texts["dropped"]).startswith("</article>")
    assert HOSTILE in "".join(page.texts["h2"]) and HOSTILE in "".join(page.texts["h3"])
    assert len(page.images) == 2 and all(HOSTILE in image["alt"] for image in page.images)


def test_word_pieces_are_joined_as_the_tokenizer_joins_them():
    words = [
        Piece("A", 0, True),
        Piece(" tri", 0, True),
        Piece("angle", 0, False),
        Piece(",\n", 0, True),
        Piece("猫!", 1),
    ]
    page = Page(page_of(looked(words), {"dense": [1, 2]}))
    assert "".join(page.texts["answer"]) == "A triangle,\n猫!"
    assert page.texts["dropped"][0] == "angle"


def test_tokens_of_no_place_are_said_and_not_drawn(tmp_path):
    found = looked([Piece("x", 0, True)], grid=None)
    page = (write_all(found, tmp_path)).read_text(encoding="utf-8")
    assert "no place" in page and len(Page(page).images) == 1
    assert not (tmp_path / "kept.png").exists() and (tmp_path / "answers.png").exists()


def test_a_dense_cache_that_was_not_run_is_called_calculated():
    found = looked([Piece("x", 0, True)])
    assert cache_lines(found.sights) == {DENSE_CALCULATED: [3, 4], "dense": [2, 3]}
    assert DENSE_CALCULATED in page_of(found, cache_lines(found.sights))


@pytest.mark.parametrize(
    ("projector", "strategy", "grid"),
    [
        ("mlp", "default", PatchGrid(24, 24)),
        ("mlp", "full", PatchGrid(24, 24, 1)),
        ("pixel_shuffle", "default", PatchGrid(12, 12)),
        ("tokenpacker_4", "default", PatchGrid(6, 6)),
        ("tests.toys.pooled:Pooled", "default", None),
    ],
)
def test_where_image_tokens_lie(projector, strategy, grid):
    import tests.toys.pooled  # noqa: F401  (a checkpoint's word imports no code)

    vision = SimpleNamespace(image_size=336, patch_size=14)
    config = SimpleNamespace(projector=projector, vision_config=vision, vision_feature_select_strategy=strategy)
    assert patch_grid(config) == grid
    assert patch_grid(SimpleNamespace(**vars(config), added_image_tokens=3)) is None
    if grid is not None and grid.first:
        assert grid.patches([0, 1, 5]) == [0, 4]


ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202eevil\x00\rback\x7f"


@pytest.mark.parametrize("command", ["look", "chat"])
def test_a_model_cannot_steer_the_terminal(made, command, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(DynamicLlavaProcessor, "decode", lambda self, ids, **_: ESCAPES * len(ids))
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\n"))
    given = ["--model", made.model, "--image", str(made.folder / "square.png"), "--max-new-tokens", "3"]
    if command == "look":
        assert main([*given, "--ask", "What?", "--method", "dense", "--out", str(tmp_path)]) == 0
        for file in ("index.html", "look.json", "answers.svg"):
            text = (tmp_path / file).read_text(encoding="utf-8")
            assert not re.search(r"\\u(00[0189]|007f|202e)", text)
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    else:
        assert chat(given) == 0
    said = capsys.readouterr()
    assert "evil" in said.out
    ours = said.out + said.err.rpartition("\r")[2]  # behind transformers' bar, which a process of its own does not show
    assert "cache: " in ours and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", ours)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model", "MODEL", "--ask", "x"], "--image is missing: MODEL needs one"),
        (["--image", "nowhere.png"], "there is no image file nowhere.png"),
        (["--model", "nowhere", "--image", "square.png"], "nowhere"),
        (["--image", "turns.txt"], "is no image"),
        (["--turns", "nowhere.txt"], "there is no file nowhere.txt of questions"),
        (["--turns", "square.png"], "is not written in UTF-8"),
        (["--turns", "empty.txt"], "holds no question"),
        (["--ask", "a\x1b[2J"], "which is no text"),
        (["--ask", " "], "the question is empty"),
        (["--method", "fastv", "--method", "fastv"], "--method fastv is given twice"),
        (["--method", "dynamic"], "is a dense checkpoint without predictors"),
        (["--method", "fastw"], "did you mean 'fastv'"),
        (["--method", "fastv", "--method.layer", "9"], "layer"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
    ],
)
def test_mistakes_are_told_before_anything_is_asked(made, given, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(made.folder)
    (made.folder / "empty.txt").write_text("\n \n")
    words = [made.model if word == "MODEL" else word for word in given]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr()
    assert said.replace("MODEL", made.model) in error.err and error.err.count("\n") == 1 and not error.out
    assert not (tmp_path / "out").exists()


def test_a_question_without_room_is_not_asked_and_loses_nothing(made, capsys, tmp_path):
    (tmp_path / "turns.txt").write_text(f"{'word ' * 1100}\nAnd now?\n")
    options = {"images": (made.folder / "square.png",), "ask": "What?", "turns": tmp_path / "turns.txt"}
    found = look(LookOptions(model=made.model, methods=({"name": "dynamic"},), max_new_tokens=3, **options))
    first, long, last = found.sights[0].turns
    assert long.tokens == 0 and long.ended.startswith("not asked: with this question the conversation has")
    assert first.tokens and last.tokens and found.sights[0].kept == asked(made, "dynamic", 1, ["What?"], 3)[0]
    assert "not asked: with this question" in page_of(found, cache_lines(found.sights))
    assert "not asked" in capsys.readouterr().err


def test_a_setting_without_its_method_is_told(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--method.layer", "3", "--method", "fastv"])
    assert "stands before the method that it is a setting of" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_all(looked([Piece("x", 0, True)]), tmp_path / "file")


def test_what_a_checkpoint_was_trained_for_decides_and_is_said(made, capsys, tmp_path):
    """The shipped model, which was trained for nothing, answers whole in tests/test_commands.py, by words of docs."""
    write_test_set(tmp_path, images=1)
    options = {"images": (tmp_path / "0.png",), "max_new_tokens": 2}
    assert [sight.label for sight in look(LookOptions(model=made.model, **options)).sights] == ["dense", "dynamic"]
    assert "trained for no method" not in capsys.readouterr().err
    assert [sight.label for sight in look(LookOptions(**options)).sights] == ["dense", "fastv"]
    assert "tiny was trained for no method, so fastv decides" in capsys.readouterr().err
