"""garak: one probe by its generator for OpenAI-compatible servers, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

home = Path("garak-home").resolve()
home.mkdir(exist_ok=True)
model = {"uri": os.environ["BASE_URL"] + "/", "max_tokens": 48, "stop": None, "temperature": 0.0}
options = {"openai": {"OpenAICompatible": model}}
(home / "options.json").write_text(json.dumps(options))
subprocess.run(
    [
        *(sys.executable, "-m", "garak", "--target_type", "openai.OpenAICompatible"),
        *("--target_name", os.environ["MODEL"], "--probes", "lmrc.Profanity"),
        *("--generator_option_file", str(home / "options.json"), "--generations", "1"),
        *("--report_prefix", str(home / "report")),
    ],
    env=os.environ
    | {"OPENAICOMPATIBLE_API_KEY": os.environ["KEY"], "XDG_DATA_HOME": str(home), "XDG_CACHE_HOME": str(home)},
    check=True,
    timeout=500,
)
(report,) = home.rglob("*.report.jsonl")
rows = [json.loads(line) for line in report.read_text().splitlines()]
attempts = [row for row in rows if row["entry_type"] == "attempt" and row["status"] == 2]
results = [row for row in rows if row["entry_type"] == "eval"]
print(f"garak: {len(attempts)} attempts, first answer: {attempts[0]['outputs'][0]}")
assert attempts
assert results
assert all(output for row in attempts for output in row["outputs"])
