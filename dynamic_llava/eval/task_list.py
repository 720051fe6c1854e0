"""`--tasks list`: every task with its files, what is there and what is missing, and where to get it; no torch here."""

from pathlib import Path

from dynamic_llava.eval.tasks import GROUPS, TASKS, Task


def task_label(task: Task) -> str:
    """Return the name that asks for this task: with its split where one was asked for."""
    return task.name if task.split is None else f"{task.name}:{task.split}"


def missing_files(task: Task, root: Path) -> list[tuple[Path, str]]:
    """Return (path, where to get it) of what a task reads below `root` and is not there."""
    needed = [(root / file.path, file.get) for file in task.needed_files()]
    return [(path, get) for path, get in needed if not path.exists()]


def task_list(root: Path) -> str:
    """Return all tasks and splits as text, a line a file."""
    lines = [f"data root: {root}; groups: {', '.join(GROUPS)}"]
    for kind in TASKS.values():
        lines += ["", f"{kind.name}  ({kind.title}{''.join(f', {group}' for group in kind.groups)})"]
        for split in kind.splits or (None,):
            lines += _split_lines(kind(split), root)
        if kind.hub is not None:
            config = f", configuration {kind.hub.config}" if kind.hub.config else ""
            lines.append(f"  or --source hf: {kind.hub.dataset}{config}")
        if kind.send_to:
            lines.append(f"  answers go to: {kind.send_to}")
    return "\n".join(lines)


def _split_lines(task: Task, root: Path) -> list[str]:
    missing = {path for path, _ in missing_files(task, root)}
    state = f"{len(missing)} missing" if missing else "ready"
    lines = [f"  {task_label(task)}: {state}"]
    for file in task.needed_files():
        absent = root / file.path in missing
        lines.append(f"    {'MISSING' if absent else 'found  '}  {file.path}  ({file.holds})")
        lines += [f"             get it from {file.get}"] if absent else []
    return lines
