"""The page of a soak: law or fault, cases planned, run and failed, and how to see each failure again."""

import json
from datetime import datetime, timezone
from pathlib import Path

from dynamic_llava.provenance import environment

VERSIONS = ("torch", "transformers", "python", "machine", "cores", "commit")


def merged(states):
    """Join the ledgers of a part's shards: check -> its numbers as one."""
    joined = {}
    for state in states:
        for name, check in state.items():
            one = joined.setdefault(name, {"planned": 0, "ran": 0, "failures": 0, "found": [], "note": ""})
            for key in ("planned", "ran", "failures", "found"):
                one[key] += check[key]
            one["note"] = one["note"] or check["note"]
    return joined


def totals(results):
    """Return (planned, run, failures) over all checks of part -> check -> numbers."""
    checks = [check for checks in results.values() for check in checks.values()]
    return tuple(sum(check[key] for check in checks) for key in ("planned", "ran", "failures"))


def is_whole(results):
    """Whether every planned case has run and none has failed."""
    checks = [check for checks in results.values() for check in checks.values()]
    return all(check["ran"] >= check["planned"] and not check["failures"] for check in checks)


def page(results, about):
    """Return the page in markdown; results are part -> check -> numbers, `about` what the run was."""
    planned, ran, failures = totals(results)
    state = "ended" if about["ended"] else "interrupted or still running"
    lines = [
        "# Reliability",
        "",
        "Laws over everything that can vary, jobs killed at random moments, faults of the machine, spoilt files of "
        "every kind, long runs. A case that was planned and did not run counts as not passed.",
        "",
        "| part | law or fault | planned | run | failures |",
        "|:--|:--|--:|--:|--:|",
    ]
    for part, checks in results.items():
        lines += [
            f"| {part} | {name}{': ' + check['note'] if check['note'] else ''} "
            f"| {check['planned']:,} | {check['ran']:,} | {check['failures']:,} |"
            for name, check in checks.items()
        ]
    lines += [
        f"| **all** | | **{planned:,}** | **{ran:,}** | **{failures:,}** |",
        "",
        f"Made by `{about['command']}` (seed {about['seed']}) on {about['date']}; {about['seconds']:.0f} s of "
        f"{about['minutes']:g} minutes, {state}; torch {about['torch']}, transformers {about['transformers']}, Python "
        f"{about['python']}, {about['machine']}, {about['cores']} cores, commit {about['commit']}. Means: "
        f"{about['means']}",
    ]
    for part, checks in results.items():
        for name, check in checks.items():
            for found in check["found"]:
                lines += ["", f"## Failure: {part}, {name}", "", "```", found["what"].strip(), "```", ""]
                lines += ["```", found["reproduction"].strip(), "```"]
    return "\n".join(lines) + "\n"


class Page:
    """Writes the page and the JSON beside it, each time as a whole."""

    def __init__(self, output, command, seed, minutes, means):
        self.output = Path(output)
        made = environment()
        self.about = {name: made[name] for name in VERSIONS}
        self.about |= {"command": command, "seed": seed, "minutes": minutes, "means": means}
        self.about["date"] = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")

    def write(self, results, seconds, *, ended=False):
        """Write what is known by now."""
        about = {**self.about, "seconds": seconds, "ended": ended}
        self.output.parent.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (self.output, page(results, about)),
            (self.output.with_suffix(".json"), json.dumps({"about": about, "parts": results}, indent=1) + "\n"),
        ):
            partial = path.with_name(path.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
