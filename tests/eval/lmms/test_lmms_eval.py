"""The plug-in inside lmms-eval; scripts/test_lmms_eval.sh runs this file in the environment that it needs."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own: bash scripts/test_lmms_eval.sh")

from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.models import get_model

from dynamic_llava.eval import harness
from dynamic_llava.eval.lmms import model as plugin
from dynamic_llava.eval.lmms.model import DynamicLlavaChatLMM, DynamicLlavaLMM, KeptCounts
from dynamic_llava.sparsity.decisions import budget
from tests.eval.lmms.toy_data import MAX_NEW_TOKENS, own_answers, pictures, write_toy
from tests.sft_builders import write_checkpoint

TOY = Path(__file__).parent / "toy"
SETTINGS = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0.0, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny checkpoint, the toy task's folder and its documents."""
    folder = tmp_path_factory.mktemp("toy")
    checkpoint = write_checkpoint(folder / "model")
    return SimpleNamespace(folder=folder, checkpoint=checkpoint, documents=write_toy(folder), answers={})


def expected(world, **arguments):
    """Return what the model itself answers to each document alone; computed once."""
    key = repr(sorted(arguments.items()))
    if key not in world.answers:
        world.answers[key] = own_answers(world.checkpoint, world.folder, world.documents, **arguments)
    return world.answers[key]


def build(world, kind=DynamicLlavaLMM, **arguments):
    model = kind(str(world.checkpoint), **arguments)
    model.task_dict = {"toy": {"test": world.documents}}
    return model


def texts(model, requests):
    """Return the answers without their counts."""
    return [result.text for result in model.generate_until(requests)]


def chat_messages(world, document, **rounds):
    """Return messages as lmms-eval 0.7.3 makes them of doc_to_visual and doc_to_text (api/task.py)."""
    content = [{"type": "image", "url": picture} for picture in pictures(world.folder, document)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": document["question"]}]}]


def ask_chats(world, settings=None, messages=chat_messages, order=None, kind="generate_until"):
    """Return requests as lmms-eval builds them for a chat model."""
    return [
        Instance(
            request_type=kind,
            arguments=("context", partial(messages, world), settings or SETTINGS, i, "toy", "test"),
            idx=0,
            metadata={"task": "toy", "doc_id": i, "repeats": 1},
        )
        for i in (order or range(len(world.documents)))
    ]


def ask(world, settings=None, order=None, documents=None):
    """Return requests as lmms-eval builds them for a simple model."""
    documents = world.documents if documents is None else documents
    return [
        Instance(
            request_type="generate_until",
            arguments=(
                documents[i]["question"],
                settings or SETTINGS,
                partial(pictures, world.folder),
                i,
                "toy",
                "test",
            ),
            idx=0,
            metadata={"task": "toy", "doc_id": i, "repeats": 1},
        )
        for i in (order or range(len(documents)))
    ]


def test_torchvision_is_not_there():
    assert importlib.util.find_spec("torchvision") is None, "this environment has to show that nothing needs it"


def test_lmms_eval_finds_the_model_by_its_entry_point():
    assert get_model("dynamic_llava") is DynamicLlavaChatLMM and not DynamicLlavaChatLMM.is_simple
    assert get_model("dynamic_llava", force_simple=True) is DynamicLlavaLMM and DynamicLlavaLMM.is_simple


def test_the_plug_in_needs_no_training_package():
    code = "import sys, dynamic_llava.eval.lmms.model\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert not {"peft", "omegaconf", "tyro", "matplotlib", "deepspeed", "wandb"} & set(loaded.stdout.split())


@pytest.mark.parametrize("batch_size", [1, 4, "16"])
@pytest.mark.parametrize("switches", [{}, {"sparsity": "image", "image_keep_rate": 0.5}, {"sparsity": "none"}])
def test_answers_are_those_of_generate_at_every_batch_size(world, batch_size, switches):
    assert texts(build(world, batch_size=batch_size, **switches), ask(world)) == expected(world, **switches)
    assert len(set(expected(world, **switches))) > 4


def test_the_switches_change_answers(world):
    answers = [
        expected(world),
        expected(world, sparsity="none"),
        expected(world, sparsity="image", image_keep_rate=0.5),
    ]
    assert all(one != other for one, other in itertools.combinations(answers, 2))


def test_answers_come_in_the_order_of_the_requests(world):
    order = [4, 0, 6, 2, 2, 5, 1, 3]
    answers = texts(build(world, batch_size=3), ask(world, order=order))
    assert answers == [expected(world)[place] for place in order]


def test_each_request_has_its_own_settings(world):
    short, long = SETTINGS | {"max_new_tokens": 3}, SETTINGS
    model = build(world, batch_size=8)
    mixed = [pair for pairs in zip(ask(world, short), ask(world, long), strict=True) for pair in pairs]
    answers = texts(model, mixed)
    assert answers[::2] == expected(world, max_new_tokens=3)
    assert answers[1::2] == expected(world)


def test_beams(world):
    answers = texts(build(world, batch_size=4), ask(world, SETTINGS | {"num_beams": 3}))
    assert answers == expected(world, num_beams=3) != expected(world)


def test_sampling_follows_torchs_seed(world):
    import torch

    model, hot = build(world, batch_size=8), SETTINGS | {"temperature": 1.5, "do_sample": True}
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(texts(model, ask(world, hot)))
    assert runs[0] == runs[1] != runs[2]


def test_an_answer_ends_at_the_end_token_whatever_the_batch(world):
    model = build(world, batch_size=8)
    whole = texts(model, ask(world))
    end = model.processor.tokenizer(whole[0][4]).input_ids[-1]
    model.model.generation_config.eos_token_id = end
    answers = texts(model, ask(world))
    assert answers == expected(world, end=end)
    assert whole[0].startswith(answers[0]) and len(answers[0]) < len(whole[0])


def test_an_answer_ends_before_until(world):
    model = build(world, batch_size=8)
    whole = texts(model, ask(world))
    stop = whole[0][4:6]
    cut = texts(model, ask(world, SETTINGS | {"until": [stop]}))
    assert cut == [answer.split(stop)[0].strip() for answer in whole]
    assert cut[0] == whole[0][:4].strip() != whole[0]


def test_settings_of_a_method_stand_behind_its_name(world):
    spelled = {"name": "mixed", "output_by": {"name": "random", "seed": 5}}
    given = {"method": "mixed", "method.output-by": "random", "method.output-by.seed": "5"}
    assert texts(build(world, batch_size=2, **given), ask(world)) == expected(world, method=spelled)
    with pytest.raises(ValueError, match="did you mean 'layer'"):
        build(world, method="fastv", **{"method.layr": 3})
    with pytest.raises(ValueError, match="does not say its name"):
        build(world, **{"method.layer": 3})


def test_random_methods_draw_by_the_document(world):
    switches = {"method": "random", "image_keep_rate": 0.25}
    one, many = (texts(build(world, batch_size=size, **switches), ask(world)) for size in (1, 8))
    assert one == many != expected(world)


def test_the_cache_is_told_of_every_answer(world):
    told = []
    model = build(world, batch_size=4)
    model.set_cache_hook(SimpleNamespace(add_partial=lambda *values: told.append(values)))
    answers = texts(model, ask(world))
    questions = [document["question"] for document in world.documents]
    wanted = [("generate_until", (text, SETTINGS), answer) for text, answer in zip(questions, answers, strict=True)]
    assert sorted(told, key=repr) == sorted(wanted, key=repr)


def test_half_precision_weights(world):
    model = build(world, batch_size=8, dtype="bfloat16")
    assert {str(parameter.dtype) for parameter in model.model.parameters()} == {"torch.bfloat16"}
    assert len(model.generate_until(ask(world))) == len(world.documents)


def test_without_requests_there_are_no_answers(world):
    assert build(world).generate_until([]) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"keep_rate": 0.2}, r"\['keep_rate'\].*image_keep_rate"),
        ({"max_batch_size": 64}, r"\['max_batch_size'\].*--batch_size"),
        ({"dtype": "int8"}, "dtype='int8'.*bfloat16"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"sparsity": "some"}, "sparsity='some'"),
        ({"image_keep_rate": 1.5}, "image_keep_rate=1.5"),
        ({"image_keep_rate": 0.5, "sparsity": "none"}, "image_keep_rate has no use"),
    ],
)
def test_bad_arguments_are_refused_before_any_weight_is_read(world, arguments, message, monkeypatch):
    monkeypatch.setattr(harness, "DynamicLlavaForConditionalGeneration", None)
    with pytest.raises(ValueError, match=message):
        build(world, **arguments)


def test_one_device_for_several_processes_is_refused(world, monkeypatch):
    several = SimpleNamespace(process_index=1, num_processes=2)
    monkeypatch.setattr(plugin, "Accelerator", lambda: several)
    with pytest.raises(ValueError, match="device='cpu' was given to 2 processes"):
        build(world, device="cpu")


def test_a_video_is_refused(world):
    request = ask(world)[0]
    request.arguments = (*request.arguments[:2], lambda document: ["film.mp4"], *request.arguments[3:])
    with pytest.raises(ValueError, match=r"document 0 of task toy shows \['str'\]"):
        build(world).generate_until([request])


def test_what_is_not_offered_says_why(world):
    model = build(world)
    with pytest.raises(NotImplementedError, match="turns log-likelihoods into text"):
        model.loglikelihood(ask(world))
    with pytest.raises(NotImplementedError, match="leave out --force_simple"):
        model.generate_until_multi_round(ask(world))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_chats_are_answered_as_the_simple_class_answers(world, batch_size):
    model = build(world, DynamicLlavaChatLMM, batch_size=batch_size)
    assert texts(model, ask_chats(world)) == expected(world)
    order = [4, 0, 6, 2, 2]
    assert texts(model, ask_chats(world, order=order)) == [expected(world)[place] for place in order]
    short, long = SETTINGS | {"max_new_tokens": 3}, SETTINGS
    mixed = [pair for pairs in zip(ask_chats(world, short), ask_chats(world, long), strict=True) for pair in pairs]
    answers = texts(model, mixed)
    assert answers[::2] == expected(world, max_new_tokens=3) and answers[1::2] == expected(world)


def test_chats_may_have_earlier_turns_and_a_system_text(world):
    def talk(world, document):
        earlier = [{"type": "text", "text": "Hello."}]
        return [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": earlier},
            {"role": "assistant", "content": [{"type": "text", "text": "Yes?"}]},
            *chat_messages(world, document),
        ]

    model = build(world, DynamicLlavaChatLMM, batch_size=1)
    (answer,) = texts(model, ask_chats(world, messages=talk, order=[3]))
    prompt = model.processor.conversation_prompt(
        [("Hello.", "Yes?"), (f"<image>\n{world.documents[3]['question']}", None)], "Be brief."
    )
    inputs = model.processor(text=[prompt], images=[pictures(world.folder, world.documents[3])])
    sequences = model.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    assert answer == model.processor.decode(sequences[0, inputs["input_ids"].shape[1] :]).strip()


def test_a_chat_with_a_film_names_its_document(world):
    def film(world, document):
        return [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]

    with pytest.raises(ValueError, match=r"document 2 of task toy: .*'video'.*no video and no sound"):
        build(world, DynamicLlavaChatLMM).generate_until(ask_chats(world, messages=film, order=[2]))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rounds_are_made_of_the_answers_before(world, batch_size):
    """Document n has n % 3 + 1 rounds; a round's question names the last answer, and the task's own notes travel."""
    seen = []

    def rounds(world, document, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return chat_messages(world, document)
        number = world.documents.index(document)
        seen.append((number, round_idx, len(previous_output), previous_round_info))
        if round_idx > number % 3:
            return None, True, previous_output, None
        text = f"{document['question']} {previous_output[-1][:5]}".replace("<image>", "it")
        content = [{"type": "image", "url": one} for one in pictures(world.folder, document)]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        return messages, False, previous_output, (previous_round_info or 0) + 1

    model = build(world, DynamicLlavaChatLMM, batch_size=batch_size)
    found = model.generate_until_multi_round(ask_chats(world, messages=rounds, kind="generate_until_multi_round"))
    assert [len(answers) for answers in found] == [number % 3 + 1 for number in range(len(world.documents))]
    assert [answers[0] for answers in found] == expected(world)
    assert all(unwrap_generation_output(answers) == (answers, None) for answers in found)
    assert all(told == (None if before == 1 else before - 1) for _, _, before, told in seen)
    assert all(round_idx == before for _, round_idx, before, _ in seen)
    world.rounds = getattr(world, "rounds", found)
    assert found == world.rounds, "a batch changes no round"


def test_a_task_without_rounds_has_one(world):
    model = build(world, DynamicLlavaChatLMM, batch_size=2)
    assert model.generate_until_multi_round(ask_chats(world)) == [[answer] for answer in expected(world)]


@pytest.mark.parametrize("switches", [{}, {"sparsity": "none"}])
def test_counts_are_those_of_the_record_whatever_the_batch(world, switches):
    counts, asked = [], {DynamicLlavaLMM: ask(world), DynamicLlavaChatLMM: ask_chats(world)}
    for kind, size in ((DynamicLlavaLMM, 1), (DynamicLlavaLMM, 4), (DynamicLlavaChatLMM, 4)):
        model = build(world, kind, batch_size=size, **switches)
        counts.append([result.token_counts.to_dict() for result in model.generate_until(asked[kind])])
    assert counts[0] == counts[1] == counts[2]
    each = model.processor.tokens_per_image
    kept = each if switches else budget(model.model.config.sparsity.image_keep_rate, each)
    for document, found in zip(world.documents, counts[0], strict=True):
        images = len(document["images"])
        assert (found["image_tokens"], found["kept_image_tokens"]) == (images * each, images * kept)
        assert found["output_tokens"] == MAX_NEW_TOKENS and found["input_tokens"] > found["image_tokens"]
        assert found["kept_output_tokens"] == MAX_NEW_TOKENS - 1 if switches else found["kept_output_tokens"] >= 0
        assert found["cache_bytes"] > 0
    _, told = unwrap_generation_output(model.generate_until(ask_chats(world, order=[1]))[0])
    assert isinstance(told, KeptCounts) and told.to_dict() == counts[0][1]


def test_the_harness_is_told_times_and_what_was_kept(world):
    from lmms_eval.models.model_utils.gen_metrics import reset_logged_metrics, summarize_logged_metrics

    reset_logged_metrics()
    results = build(world, batch_size=4).generate_until(ask(world))
    told = summarize_logged_metrics()
    assert told["total_gen_tokens"] == sum(result.token_counts.output_tokens for result in results)
    assert told["total_elapsed_time"] > 0 and told["avg_latency"] == told["total_elapsed_time"] / len(results)
    mean = sum(result.token_counts.cache_bytes for result in results) / len(results)
    assert told["avg_cache_bytes"] == pytest.approx(mean) and told["avg_kept_image_tokens"] > 0
    reset_logged_metrics()
    assert build(world).generate_until([]) == [] and summarize_logged_metrics() == {}


def test_lmms_eval_still_turns_loglikelihoods_into_text():
    """The reason for refusing them; where this fails, lmms-eval has changed and loglikelihood can be offered."""
    assert unwrap_generation_output((-0.5, True)) == ("(-0.5, True)", None)


def evaluate(world, output, *, processes=1, model_args="", batch_size=4, more=()):
    """Run lmms-eval on the toy task as a user would, offline; return the logged answers by document and the results."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [
        *(sys.executable, *launch, "-m", "lmms_eval", "--model", "dynamic_llava"),
        *("--model_args", f"pretrained={world.checkpoint}{model_args}", "--batch_size", str(batch_size)),
        *("--tasks", "toy", "--include_path", str(TOY), "--log_samples", "--output_path", str(output), *more),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(world.folder / "hf"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=world.folder, env=os.environ | offline, capture_output=True, text=True, timeout=600
    )
    samples = list(Path(output).rglob("*_samples_toy.jsonl"))
    assert run.returncode == 0 and len(samples) == 1, run.stdout + run.stderr
    lines = [json.loads(line) for line in samples[0].read_text(encoding="utf-8").splitlines()]
    answers = {line["doc_id"]: line["filtered_resps"] for line in lines}
    (results,) = Path(output).rglob("*_results.json")
    assert len(answers) == len(lines) == len(world.documents)
    return [answers[i] for i in range(len(lines))], json.loads(results.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "more", "kind"),
    [(1, (), "DynamicLlavaChatLMM (chat)"), (1, ("--force_simple",), "DynamicLlavaLMM (simple)"), (2, (), "(chat)")],
)
def test_lmms_eval_end_to_end(world, tmp_path, processes, more, kind):
    switches = {"sparsity": "image", "image_keep_rate": 0.5} if processes == 2 else {"sparsity": "both"}
    model_args = "".join(f",{name}={value}" for name, value in switches.items())
    answers, results = evaluate(world, tmp_path, processes=processes, model_args=model_args, more=more)
    assert answers == expected(world, **switches)
    assert results["results"]["toy"]["exact_match,none"] == 0.0
    assert kind in results["config"]["model_backend"]
    efficiency = results["efficiency"]["overall"]
    assert efficiency["docs_with_token_counts"] == len(world.documents)
    assert efficiency["total_output_tokens"] == len(world.documents) * MAX_NEW_TOKENS
    assert results["throughput"]["avg_cache_bytes"] > 0
