"""`python -m dynamic_llava.profile COMMAND ...`: what the method costs, by calculation and measured.

Models have random weights, so no checkpoint is needed; nothing beyond torch and transformers is imported, except for
`memory CONFIG.yaml`, which reads a training configuration, `data`, and for pictures, which need matplotlib.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamic_llava.cli.commands import Parser, add_method, entry_point, exit_on_mistake, missing_package
from dynamic_llava.files import WriteError
from dynamic_llava.profile.bases import add_bases, base_report, bases_asked

if TYPE_CHECKING:
    import torch

    from dynamic_llava.profile.results import Report

PROGRAM = "python -m dynamic_llava.profile"
TRAINING_HELP = """
memory CONFIG.yaml [--gpus N] [--gpu-memory GB] [--shape 7b|13b] [--batch-size N] [--json]
  calculates the memory of a training run instead: weights, gradients, optimizer states, activations and buffers on each
  GPU; the exit code is 1 where that does not fit into --gpu-memory
"""


@entry_point("train")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code.

    1 where training does not fit or a measurement failed, 2 for a mistake, 74 where a file could not be written.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["memory"] and given[1:2] and not given[1].startswith("-"):
            return _training_memory(given)
        options = _parser().parse_args(given)
        return options.run(options)
    except (ValueError, FileNotFoundError, WriteError) as error:
        return exit_on_mistake(error)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Any], int], text: str, epilog: str | None = None) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, epilog=epilog)
        made.set_defaults(run=run)
        return made

    flops = command("flops", _flops, "FLOPs of the paper's tables: Eq. 13, and exact from the modules' shapes")
    tokens = command("tokens", _tokens, "token statistics (Table 8)")
    memory = command("memory", _memory, "memory of a generation, or of a training run (CONFIG.yaml)", TRAINING_HELP)
    latency = command("latency", _latency, "times of vision tower, prefill and steps, with and without cache; totals")
    roofline = command("roofline", _roofline, "the same beside the device's limit, measured too; or limits of bases")
    training = command("training", _training, "a training step's time, and its memory measured beside the calculation")
    curve = command("curve", _curve, "FLOPs and memory over generated tokens (Fig. 1)")
    for made in (flops, tokens, memory, latency, roofline, training, curve):
        made.add_argument("--json", action="store_true", help="print one line of JSON per row after the table")
    for made in (memory, latency, roofline, training, curve):
        _add_preset(made, several=made is roofline)
        add_method(made)
    for made in (memory, latency, roofline, curve):
        made.add_argument("--outputs", type=int, nargs="+", help="numbers of generated tokens (default: the preset's)")
    for made in (memory, latency, roofline, training):
        made.add_argument("--device", help="cpu, or an accelerator's name (default: the accelerator, if there is one)")
    memory.add_argument("--measured", action="store_true", help="run it too, and read the peak")
    for made in (latency, roofline):
        made.add_argument("--compiled", action="store_true", help="time compiled steps as well (it takes minutes)")
        made.add_argument("--uncached", action="store_true", help="time steps without cache as well")
    add_bases(roofline)
    curve.add_argument("--tokens", type=int, help="longest answer (default: the preset's, a quarter longer)")
    curve.add_argument("--plot", type=Path, help="write the curves as PNG (needs matplotlib)")
    curve.add_argument("--device-memory", type=float, help="GiB of a device, marked in the picture")
    _add_benchmark(command)
    return parser


def _add_benchmark(command: Callable[..., argparse.ArgumentParser]) -> None:
    from dynamic_llava.profile.runner import SETS

    whole = command("benchmark", _benchmark, "everything that the device at hand can show, part by part")
    part = command("part", _part, "one part of it, in this process: what `benchmark` starts")
    part.add_argument("name", help="name of the part; `benchmark` prints them")
    part.add_argument("--results", type=Path, required=True, help="file that lines of JSON are added to")
    part.add_argument("--attached", action="store_true", help="end when standard input is closed")
    about = "; ".join(
        f"{name}: {len(parts)} parts, {sum(part.seconds for part in parts):g} s" for name, parts in SETS.items()
    )
    for made in (whole, part):
        made.add_argument("--set", choices=SETS, required=made is part, help=f"{about} (default: cpu or gpu, as found)")
        made.add_argument("--device", help="cpu, or an accelerator's name (default: what the set is for)")
    whole.add_argument(
        "--output-folder", type=Path, default=Path("runs/benchmark"), help="new folder of the four files"
    )
    whole.add_argument(
        "--seconds",
        type=float,
        help="time that may be spent: parts that do not fit are left out, what the plan does not need is to spare "
        "(default: the set's)",
    )
    whole.add_argument("--parts", nargs="+", default=(), help="only these parts (default: all of the set)")
    _add_against(command)
    _add_data(command)
    summary = command("summary", _summary, "write a benchmark's summary again, from its lines; or publish it")
    summary.add_argument("folder", type=Path, help="the benchmark's --output-folder")
    summary.add_argument("--publish", type=Path, metavar="DIR", help="write benchmark_<device>.md and .json there")


def _add_against(command: Callable[..., argparse.ArgumentParser]) -> None:
    from dynamic_llava.profile.against import COMPARED

    text = "how much longer steps, prefill, training and scoring take here than in another checkout, by turns"
    against = command("against", _against, text)
    against.add_argument("folder", type=Path, help="the other checkout, as `git worktree add FOLDER COMMIT` makes it")
    names = [compared.name for compared in COMPARED]
    against.add_argument("--calls", nargs="+", choices=names, default=names, help="what is compared")
    against.add_argument("--pairs", type=int, default=5, help="pairs of processes, one after the other, for each call")
    against.add_argument(
        "--limit", type=float, help="exit code 1 where a ratio is above it, its whole interval included (e.g. 1.03)"
    )
    against.add_argument("--json", action="store_true", help="print one line of JSON per row after the table")


def _add_data(command: Callable[..., argparse.ArgumentParser]) -> None:
    text = "generate data of the size of LLaVA's mixture, and measure training's reading on it (needs the extra train)"
    data = command("data", _data, text)
    data.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/data_benchmark"),
        help="folder of the generated data and of what is prepared from it; about 2 GB; replaced by each run",
    )
    data.add_argument("--samples", type=int, default=665_000, help="samples of the JSON file")
    data.add_argument("--pictures", type=int, default=400, help="different pictures; each sample shows one of them")
    data.add_argument("--throughput-samples", type=int, default=3000, help="samples over which the pipeline is timed")
    data.add_argument("--workers", type=int, default=0, help="worker processes; 0: one per core")
    data.add_argument("--seed", type=int, default=0, help="seed of the generated data and of its order")
    data.add_argument("--output", type=Path, default=Path("docs/results/data"), help="results, without .md and .json")


def _add_preset(parser: argparse.ArgumentParser, several: bool = False) -> None:
    from dynamic_llava.profile.presets import PRESETS

    known = "; ".join(f"{preset.name}: {preset.about}" for preset in PRESETS.values())
    parser.add_argument("--preset", default="table4", help=f"protocol, one of {known}")
    parser.add_argument("--batch-size", type=int, nargs="+" if several else None, help="rows (default: the preset's)")
    parser.add_argument("--layers", type=int, help="fewer decoder layers, to save memory (default: the preset's)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="number format (default: float32 on a CPU, else bfloat16)",
    )


def _preset(options: Any) -> Any:
    from dataclasses import replace

    from dynamic_llava.profile.presets import find_preset

    preset = find_preset(options.preset).with_layers(options.layers)
    outputs = getattr(options, "outputs", None)  # a training step generates nothing
    changes = {"batch": options.batch_size, "outputs": tuple(outputs) if outputs else None}
    preset = replace(preset, **{name: value for name, value in changes.items() if value is not None})
    if getattr(options, "method", None) is None:
        return preset
    from dynamic_llava.profile.rehearsal import preset_under

    return preset_under(preset, options.method)


def _show(options: Any, reports: Sequence["Report"], device: "torch.device | None" = None) -> int:
    from dynamic_llava.profile.results import measured_on

    print("\n\n".join(report.table() for report in reports))
    if options.json:
        about = measured_on(device)
        print("\n".join(line for report in reports for line in report.lines(about)))
    return 0


def _flops(options: Any) -> int:
    from dynamic_llava.profile.tables import decoding_report, prefill_report

    return _show(options, [prefill_report(), decoding_report()])


def _tokens(options: Any) -> int:
    from dynamic_llava.profile.tables import tokens_report

    return _show(options, [tokens_report()])


def _memory(options: Any) -> int:
    from dynamic_llava.profile.inference_memory import memory_report
    from dynamic_llava.profile.workload import device_asked, dtype_asked

    preset = _preset(options)
    if not options.measured:
        if options.device is not None:
            raise ValueError("--device belongs to --measured; without it memory is calculated, for any device")
        return _show(options, [memory_report(preset, preset.ways, dtype_asked(options.dtype, None).itemsize)])
    from dynamic_llava.profile.latency import Bench, Effort
    from dynamic_llava.profile.parts import measured_report

    device = device_asked(options.device)
    bench = Bench(preset, device, dtype_asked(options.dtype, device), Effort.on(device))
    return _show(options, [measured_report(bench)], device)


def _roofline(options: Any) -> int:
    return _show(options, [base_report(options)]) if bases_asked(options) else _latency(options, limited=True)


def _latency(options: Any, limited: bool = False) -> int:
    from dynamic_llava.profile import latency
    from dynamic_llava.profile.measuring import measure_limits
    from dynamic_llava.profile.workload import device_asked, dtype_asked

    preset, device = _preset(options), device_asked(options.device)
    dtype = dtype_asked(options.dtype, device)
    bench = latency.Bench(preset, device, dtype, latency.Effort.on(device))
    variants = latency.EAGER + (latency.COMPILED if options.compiled else ())
    variants = tuple(variant for variant in variants if variant.way in preset.ways)
    lengths = (0, *preset.outputs)
    rows = [*latency.vision_rows(bench), *latency.prefill_rows(bench), *latency.step_rows(bench, variants, lengths)]
    if options.uncached:
        rows += latency.uncached_rows(bench, lengths)
    limits = measure_limits(device, dtype) if limited else None
    _show(options, [latency.latency_report(preset, rows, limits)], device)
    failed = latency.failures(rows)
    for line in failed:
        print(f"could not be timed: {line}", file=sys.stderr)
    return 1 if failed else 0


def _training(options: Any) -> int:
    from dynamic_llava.costs import device_peak
    from dynamic_llava.profile.measuring import measure_limits
    from dynamic_llava.profile.results import device_name
    from dynamic_llava.profile.training import training_report
    from dynamic_llava.profile.workload import device_asked, dtype_asked

    preset, device = _preset(options), device_asked(options.device)
    dtype, peak = dtype_asked(options.dtype, device), device_peak(device_name(device))
    flops = measure_limits(device, dtype).flops_per_second if peak is None else peak.tflops * 1e12
    return _show(options, [training_report(preset, device, dtype, flops)], device)


def _curve(options: Any) -> int:
    from dynamic_llava.profile.tables import curve_report
    from dynamic_llava.profile.workload import dtype_asked

    preset = _preset(options)
    longest = options.tokens if options.tokens is not None else preset.outputs[-1] * 5 // 4
    report = curve_report(preset, longest, dtype_asked(options.dtype, None).itemsize)
    if options.device_memory is not None and options.plot is None:
        raise ValueError("--device-memory is a mark in the picture; give --plot as well, or leave it out")
    _show(options, [report])
    if options.plot is not None:
        print(draw_curve(report, options.plot, preset.about, options.device_memory))
    return 0


def draw_curve(report: "Report", path: Path, title: str, device_gib: float | None = None) -> str:
    """Draw the curve report where matplotlib is installed; return a line that says what was done."""
    try:
        from dynamic_llava.viz.curves import draw_cost_curves
    except ImportError as error:
        return f"no picture was drawn: {missing_package(error, 'train') or error}"
    return f"wrote {draw_cost_curves(path, report.rows, device_gib=device_gib, title=title)}"


def _against(options: Any) -> int:
    from dynamic_llava.profile.against import COMPARED, against_report, check_folder, compare

    folder, rows, failed = check_folder(options.folder), [], []
    if options.pairs < 1:
        raise ValueError(f"--pairs {options.pairs} is too few; give 1 or more")
    for compared in COMPARED:
        if compared.name in options.calls:
            try:
                rows.append(compare(compared, folder, options.pairs))
                ratio, low, high = (rows[-1][name] for name in ("ratio", "low", "high"))
                print(f"{compared.name}: {ratio:.3f} ({low:.3f} to {high:.3f})", file=sys.stderr, flush=True)
            except RuntimeError as error:
                failed.append(f"could not be compared: {error}")
    _show(options, [against_report(rows, folder)])
    slower = [row["call"] for row in rows if options.limit is not None and row["low"] > options.limit]
    failed += [f"slower than {options.limit:g} times: {', '.join(slower)}"] if slower else []
    print("\n".join(failed), end="\n" if failed else "", file=sys.stderr)
    return 1 if failed else 0


def _benchmark(options: Any) -> int:
    import time

    from dynamic_llava.profile import runner, summary

    begun = time.monotonic()
    chosen = options.set if options.set is not None else runner.set_found(options.device)
    plan = runner.plan(chosen, runner.SETS[chosen], options.seconds, options.parts)
    folder = runner.new_folder(options.output_folder)
    path = folder / summary.RESULTS
    try:
        done = runner.run(plan, lambda name: runner.part_command(name, chosen, path, options.device), folder, begun)
    except runner.Ended as end:
        return 128 + end.number
    finally:
        print(f"wrote {', '.join(str(path) for path in sorted(folder.iterdir()))}")
    return 0 if done else 1


def _part(options: Any) -> int:
    import logging
    import traceback

    from dynamic_llava.profile.results import Results
    from dynamic_llava.profile.runner import SETS, attach_to_runner

    turn = attach_to_runner() if options.attached else None
    if options.name not in (known := [part.name for part in SETS[options.set]]):
        raise ValueError(f"part {options.name!r} is not in the {options.set} set; choose one of {', '.join(known)}")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("dynamic_llava").setLevel(logging.INFO)
    results = Results(options.results, options.name)
    try:
        from dynamic_llava.profile.parts import run_part

        if turn is not None:
            turn.wait()
        run_part(options.name, options.set, results, _part_device(options))
    except Exception as error:
        traceback.print_exc()
        message = str(error).strip() or "no message"
        results.add(error=f"{type(error).__name__}: {message.splitlines()[0]}")
        return 1
    return 0


def _part_device(options: Any) -> "torch.device":
    import torch

    from dynamic_llava.profile.workload import device_asked

    if options.device is None and options.set != "gpu":
        return torch.device("cpu")
    device = device_asked(options.device)
    if options.set == "gpu" and device.type == "cpu":
        raise ValueError("torch finds no accelerator here, which the gpu set is for; --set rehearsal runs on a CPU")
    return device


def _summary(options: Any) -> int:
    from dynamic_llava.profile.summary import publish, write_summary

    paths = write_summary(options.folder)
    if options.publish is not None:
        paths += publish(options.folder, options.publish)
    for path in paths:
        print(f"wrote {path}")
    return 0


def _data(options: Any) -> int:
    from dynamic_llava.profile.data import measure_and_write

    names = ("samples", "pictures", "throughput_samples", "workers", "seed")
    given = [f"--{name.replace('_', '-')} {getattr(options, name)}" for name in names]
    sizes = {name: getattr(options, name) for name in names}
    print(measure_and_write(options.folder, sizes, options.output, " ".join([f"{PROGRAM} data", *given])))
    return 0


def _training_memory(arguments: Sequence[str]) -> int:
    from dynamic_llava.cli import choose_command, read_yaml
    from dynamic_llava.config.run import RunConfig
    from dynamic_llava.profile.training import MemoryCommand, memory_report

    command = choose_command({"memory": MemoryCommand}, arguments, PROGRAM, TRAINING_HELP)
    run = read_yaml(RunConfig, command.config)
    deepspeed = None
    if run.train.deepspeed is not None:
        from dynamic_llava.train.distributed import read_deepspeed  # seconds of imports that other runs do not need

        deepspeed = read_deepspeed(run.train.deepspeed)
    report = memory_report(command, run.model, run.data, run.sparsity, run.train, run.lora, deepspeed)
    print(report.table())
    if command.json:
        print(report.line())
    return 1 if report.fits is False else 0


if __name__ == "__main__":
    sys.exit(main())
