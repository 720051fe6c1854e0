"""Tables, intervals, targets and the results page, from made-up results."""

import json
import math
import re

import pytest

from dynamic_llava.config import SparsityConfig
from dynamic_llava.eval.metrics.seeds import mean_and_interval, student_t_probability, student_t_quantile
from dynamic_llava.tiny.__main__ import main
from dynamic_llava.tiny.job.page import ANALYSIS, report_text, write_readme_table, write_results_page
from dynamic_llava.tiny.job.tables import (
    MetricColumn,
    aggregate,
    answer_columns,
    table,
)
from dynamic_llava.tiny.job.targets import MeanTarget, target_table, targets

ENVIRONMENT = {
    "torch": "2", "transformers": "5", "python": "3", "machine": "m", "cores": 2, "threads": 2, "commit": "c",
    "source": "s",
}  # fmt: skip


def made_up(seed, shift=0.0, **extra):
    """Results that meet every target when `shift` is 0; `shift` is taken off the learned row's accuracy."""

    def row(key, accuracy, ppl, recall, image=0.2, forced=1.0, generated=1.0):
        metrics = {
            "accuracy/color": accuracy, "accuracy/all": accuracy, "ppl": ppl, "attribute_recall": recall,
            "keep_image": image, "keep_output_forced": forced, "keep_output_generated": generated,
        }  # fmt: skip
        return {"key": key, "title": f"title {key}", "note": "", "metrics": metrics}

    rows = [
        row("control", 0.97, 1.10, 0.95, image=1.0),
        row("dynamic", 0.96 - shift, 1.12, 0.93, forced=0.52, generated=0.5),
        row("fastv", 0.85, 1.3, 0.8),
        row("random_image", 0.60, 1.6, 0.5),
        row("inside_random", 0.96, 1.2, 0.8),
        row("inside_alternate", 0.96, 1.3, 0.7),
        row("inside_sinks", 0.96, 1.17, 0.9, forced=0.05),
        row("inside_recent", 0.96, 1.16, 0.9, forced=0.3),
    ]
    overlap = [{"key": "dynamic", "title": "Dynamic I|T", "note": "", "metrics": {"objects_hit": 0.99}}]
    return {
        "seed": seed, "questions": 10, "descriptions": 4, "timing_batch": 2, "seconds": 1.0, "rows": rows,
        "overlap": overlap, "training": {"image": 0.21, "output": 0.5}, "agreement": {}, "environment": ENVIRONMENT,
        **extra,
    }  # fmt: skip


def test_several_seeds_become_mean_and_interval():
    rows = [{"rows": [{"key": "a", "title": "I|T", "metrics": {"x": x, "only_some": None}}]} for x in (0.1, 0.2, 0.3)]
    merged = aggregate(rows)
    assert merged[0]["metrics"]["x"].mean == pytest.approx(0.2)
    assert merged[0]["metrics"]["x"].half == pytest.approx(4.30265 * 0.1 / 3**0.5, rel=1e-4)
    text = table(merged, (MetricColumn("x", "x", 1, 100), MetricColumn("only_some", "gone")))
    assert "20.0 ± 24.8" in text and r"I\|T" in text and "gone" not in text


def test_rows_without_a_value_show_a_dash_and_empty_rows_vanish():
    merged = aggregate(
        [{"rows": [
            {"key": "a", "title": "a", "metrics": {"x": 1.0, "y": 2.0}},
            {"key": "b", "title": "b", "metrics": {"x": 1.0}},
            {"key": "c", "title": "c", "metrics": {"z": 1.0}},
        ]}]
    )  # fmt: skip
    lines = table(merged, (MetricColumn("x", "x"), MetricColumn("y", "y"))).splitlines()
    assert len(lines) == 4
    assert lines[3].split("|")[3].strip() == "-"
    with pytest.raises(ValueError, match="at least one seed"):
        aggregate([])


def test_columns_follow_the_kinds_that_were_asked():
    heads = [column.header for column in answer_columns(made_up(0)["rows"])]
    assert heads == ["color", "all", "F1 (POPE)"]


def test_every_target_is_met_by_good_results_and_missed_by_bad_ones():
    good = target_table([made_up(0), made_up(1)], SparsityConfig())
    assert "MISSED" not in good and "not run" not in good
    assert good.count("| met") + good.count("met |") >= len(targets(SparsityConfig()))
    bad = target_table([made_up(0, shift=0.08)], SparsityConfig())
    lines = [line for line in bad.splitlines() if "MISSED" in line]
    assert len(lines) == 2  # behind the control by 9 points, and 3 instead of 6 points above FastV
    assert "9.0" in lines[0] and "3.0" in lines[1]


def long_seed(seed, sinks_35=1.15, count=0.7):
    """A seed of the long world with a model of r_OT 0.35, whose learned PPL is 1.13."""
    result = made_up(seed, world="long")
    rows = (("dynamic_35", 1.13, 0.9), ("inside_sinks_35", sinks_35, count), ("inside_recent_35", 1.2, 0.6))
    for key, ppl, told in rows:
        metrics = {"ppl": ppl, "keep_output_forced": 0.33, "forced/count": told, "forced/relation": told}
        result["rows"].append({"key": key, "title": key, "note": "", "metrics": metrics})
    return result


def verdicts(text, part):
    """Target -> verdict, of the lines that hold `part`."""
    cells = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if part in line]
    return {one[1].strip(): one[4].strip() for one in cells}


def test_whether_learned_admission_beats_windows_is_decided_by_intervals():
    clear = target_table([long_seed(0), long_seed(1, 1.1501)], SparsityConfig())
    assert set(verdicts(clear, "r_OT 0.35").values()) == {"met"} and len(verdicts(clear, "r_OT 0.35")) == 7
    unsure = verdicts(target_table([long_seed(0, 1.2), long_seed(1, 1.131)], SparsityConfig()), "sinks + window minus")
    assert unsure["PPL, sinks + window minus learned, equal slots, r_OT 0.35"] == "undecided"
    assert unsure["PPL, sinks + window minus learned, equal slots, r_OT 0.5"] == "met"
    worse = target_table([long_seed(0, 1.10, 0.95), long_seed(1, 1.1001, 0.951)], SparsityConfig())
    counts = verdicts(worse, "late counts, forced, learned minus sinks + window")
    assert counts["late counts, forced, learned minus sinks + window, equal slots, r_OT 0.35 (points)"] == "MISSED"
    ppl = verdicts(worse, "sinks + window minus learned")
    assert ppl["PPL, sinks + window minus learned, equal slots, r_OT 0.35"] == "MISSED"
    alone = verdicts(target_table([long_seed(0, 1.1301)], SparsityConfig()), "sinks + window minus learned")
    assert alone["PPL, sinks + window minus learned, equal slots, r_OT 0.35"] == "met"  # one seed has no interval


def test_more_perplexity_does_not_hide_less_recall():
    """At equal slots a window that states more of the objects is a target missed, whatever the perplexity says."""
    result = made_up(0)
    (row,) = [one for one in result["rows"] if one["key"] == "inside_sinks"]
    row["metrics"]["attribute_recall"] = 0.97
    found = verdicts(target_table([result], SparsityConfig()), "sinks + window")
    assert found == {
        "PPL, sinks + window minus learned, equal slots, r_OT 0.5": "met",
        "attribute recall, learned minus sinks + window, equal slots, r_OT 0.5 (points)": "MISSED",
    }


def test_the_long_world_has_no_bounds_of_the_default_ones_short_answers():
    text = target_table([long_seed(0)], SparsityConfig())
    assert "FastV" not in text and "late counts, forced, learned minus random + window, equal slots, r_OT 0.5" in text
    assert verdicts(text, "output keep rate, teacher-forced, r_OT 0.35") == {
        "output keep rate, teacher-forced, r_OT 0.35 (%)": "met"
    }
    report = report_text([long_seed(0)], SparsityConfig())
    assert "the statements that generated descriptions make" in report and "counts, forced" in report
    default = report_text([made_up(0)], SparsityConfig())
    assert "counts" not in default and "late counts" not in target_table([made_up(0)], SparsityConfig())


def test_the_mean_over_seeds_decides():
    results = [made_up(0, shift=0.02), made_up(1, shift=-0.02)]  # 3 points behind, 1 point ahead: 1 on average
    line = target_table(results, SparsityConfig()).splitlines()[2]
    assert "1.0 ± " in line and line.rstrip(" |").endswith("met")


def test_a_target_without_its_row_is_not_run():
    result = made_up(0)
    result["rows"] = [row for row in result["rows"] if row["key"] != "fastv"]
    assert target_table([result], SparsityConfig()).count("not run") == 1


def test_bounds_are_inclusive_unless_strict():
    assert MeanTarget("t", lambda m: 0.0, least=6).met(6.0)
    assert not MeanTarget("t", lambda m: 0.0, least=0, strict=True).met(0.0)
    assert MeanTarget("t", lambda m: 0.0, 45, 55).bounds() == "45 to 55"
    assert MeanTarget("t", lambda m: 0.0, most=2).bounds() == "at most 2"


def test_the_report_names_seeds_amounts_and_agreement():
    agreement = {
        "answers": 10, "answers_equal": 1.0, "answers_decisions_equal": 0.9,
        "descriptions": 4, "descriptions_equal": 0.5, "descriptions_decisions_equal": 1.0,
    }  # fmt: skip
    text = report_text([made_up(3, agreement=agreement)], SparsityConfig())
    assert "seed 3" in text and "10 questions" in text
    assert "100.0 % of 10 answers have the same tokens, 90.0 % the same decisions" in text
    assert "50.0 % of 4 descriptions" in text


def test_the_results_page_keeps_the_analysis(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"seeds": [made_up(0), made_up(1)]}))
    (tmp_path / "seed0" / "pictures").mkdir(parents=True)
    (tmp_path / "seed0" / "pictures" / "kept_patches.png").write_bytes(b"png")
    page = tmp_path / "docs" / "tiny.md"
    write_results_page(tmp_path, page, SparsityConfig(), "bash scripts/train.sh --seeds 2")
    page.write_text(page.read_text() + "\nWhat we learned.\n")
    write_results_page(tmp_path, page, SparsityConfig(), "bash scripts/train.sh --seeds 2")
    text = page.read_text()
    assert text.count(ANALYSIS) == 1 and text.endswith("What we learned.\n")
    assert "--seeds 2" in text and "±" in text
    assert "![kept patches](tiny_kept_patches.png)" in text
    assert (tmp_path / "docs" / "tiny_kept_patches.png").read_bytes() == b"png"
    with pytest.raises(FileNotFoundError, match=r"no results\.json"):
        write_results_page(tmp_path / "nowhere", page, SparsityConfig(), "x")


def test_the_readme_table_replaces_only_what_is_between_its_markers(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"seeds": [made_up(0), made_up(1)]}))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- tiny-table:start -->\nold\n<!-- tiny-table:end -->\nafter\n")
    write_readme_table(tmp_path, readme, "bash scripts/train.sh --seeds 2")
    once = readme.read_text()
    write_readme_table(tmp_path, readme, "bash scripts/train.sh --seeds 2")
    assert readme.read_text() == once
    assert once.startswith("before\n<!-- tiny-table:start -->\n| row")
    assert once.endswith("<!-- tiny-table:end -->\nafter\n") and "old" not in once
    assert "--seeds 2" in once and "mean over 2 seeds" in once
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="tiny-table:start"):
        write_readme_table(tmp_path, readme, "x")


def test_the_page_command_reads_a_run_folder(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"seeds": [made_up(0)]}))
    (tmp_path / "config.yaml").write_text("sparsity:\n  image_keep_rate: 0.25\n")
    page = tmp_path / "page.md"
    assert main(["page", str(tmp_path), "--page", str(page), "--made-by", "made so"]) == 0
    assert "`made so`" in page.read_text() and "20 to 30" in page.read_text()  # the bounds follow the run's settings
    assert main(["page", str(tmp_path / "none"), "--page", str(page)]) == 2
    assert "config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)]
)
def test_student_t_quantiles_of_the_tables(degrees, quantile):
    assert student_t_quantile(0.95, degrees) == pytest.approx(quantile, rel=1e-5)
    assert student_t_probability(quantile, degrees) == pytest.approx(0.95, abs=1e-5)


def test_interval_of_five_seeds_by_hand():
    mean, half = mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.77645 * math.sqrt(2.5 / 5), rel=1e-5)
    assert mean_and_interval([7.0]) == (7.0, None)
    with pytest.raises(ValueError, match="at least one"):
        mean_and_interval([])
