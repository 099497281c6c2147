"""Run folders as a training leaves them, in small."""

from __future__ import annotations

from pathlib import Path

from raycomplete.runtime.files import PRIVATE, write_text
from raycomplete.storage import integrity


def add_checkpoint(run: Path, step: int, *, kind: str = "checkpoints", content: str = "weights") -> Path:
    folder = run / kind / f"step-{step:06d}"
    write_text(folder / "state" / "rank_0.pt", f"{content} {step}")
    write_text(folder / "state" / "rank_1.pt", f"{content} {step} of the other")
    write_text(folder / "latest", "state")
    integrity.seal(folder, {"step": step})
    return folder


def add_rows(run: Path, steps: int) -> None:
    write_text(run / "metrics.jsonl", "".join(f'{{"step": {step + 1}}}\n' for step in range(steps)))


def make_run(run: Path, *steps: int) -> Path:
    """A run with checkpoints of these steps."""
    write_text(run / "config.yaml", "models: {}\n")
    write_text(run / "inputs.json", "{}")
    write_text(run / "samples.jsonl", '{"ids": [1]}\n', mode=PRIVATE)
    write_text(run / "evaluation" / "base.json", '{"rate": 1}')
    write_text(run / "ray_train" / "state.json", "{}")
    add_rows(run, max(steps, default=0))
    for step in steps:
        add_checkpoint(run, step)
    return run


def content(run: Path) -> dict[str, tuple[int, bytes]]:
    """Permissions and bytes of every file."""
    files = {path.relative_to(run).as_posix(): path for path in run.rglob("*") if path.is_file()}
    return {name: (path.stat().st_mode & 0o777, path.read_bytes()) for name, path in files.items()}


def results(run: Path) -> dict[str, tuple[int, bytes]]:
    """Without what is not mirrored."""
    return {name: value for name, value in content(run).items() if not name.startswith("ray_train")}
