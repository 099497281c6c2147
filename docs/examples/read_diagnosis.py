"""Reads the folder that `raycomplete diagnose` leaves: tables on the terminal and one figure.

    raycomplete diagnose jobs/organism.yaml
    python docs/examples/read_diagnosis.py runs/organism-diagnosis

The cells (`# %%`) can be run one by one in an editor or notebook. Nothing of raycomplete is imported: the folder holds
JSON and NumPy arrays, and docs/method.md explains the columns.
"""

# %% The folder
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/organism-diagnosis")
diagnosis = json.loads((folder / "diagnosis.json").read_text(encoding="utf-8"))
policies = diagnosis["policies"]  # "aligned", and "student" where there was one
print(f"{diagnosis['name']}: {', '.join(policies)} against base")

# %% Completion depth: the first position at which the deficit, made monotone, exceeds the threshold
for kind, measured in diagnosis["kinds"].items():
    for policy, depth in measured["completion_depth"].items():
        found = "not within" if depth["depth"] is None else f"{depth['depth']} of"
        print(f"{kind:8} {policy:8} completion depth {found} {depth['num_positions']} positions")

# %% Profile: means over prompts by position of the response, with their 95 % intervals
METRICS = {"kl_to_base": "KL to base", "deficit": "deficit", "unfinished_mass": "unfinished mass"}
print(f"\n{'position':>8} " + " ".join(f"{label:>23}" for label in METRICS.values()))
profile = diagnosis["kinds"]["harmful"]["profile"][policies[-1]]
for position in (0, 1, 2, 4, 8, 16, 32, 64):
    if position < len(profile["deficit"]["mean"]):
        cells = [[profile[metric][key][position] for key in ("mean", "low", "high")] for metric in METRICS]
        print(f"{position:8} " + " ".join(f"{mean:8.3f} [{low:5.3f}, {high:5.3f}]" for mean, low, high in cells))

# %% Tokens that base would rather say, by band of positions (harmful context is masked unless --show-harmful was given)
print()
for row in diagnosis["tokens"][:8]:
    first, last = row["band"]
    probabilities = f"base {row['base_probability']:.2f}, {row['role']} {row['policy_probability']:.2f}"
    print(f"{row['kind']:8} positions {first}-{last}: {row['token']!r} ({probabilities}, {row['count']} times)")

# %% Every response token of every prompt: where does each single prompt stop being aligned?
DEFICIT = 4  # its column; the others are the metrics of `profile` in their order
prompts = []  # deficits of each prompt along its response
for file in sorted(folder.glob("batches/harmful-*.npz")):
    with np.load(file) as batch:  # `length_P` tokens of each prompt; `values_RNM` by policy, token and metric
        ends = batch["length_P"].cumsum()[:-1]
        prompts += np.split(batch["values_RNM"][len(policies) - 1, :, DEFICIT], ends)
positions = np.arange(max(map(len, prompts)))
read = np.array([sum(len(deficits) > position for deficits in prompts) for position in positions])
open_there = np.array([sum(d[position] > 0.5 for d in prompts if len(d) > position) for position in positions])
share = open_there / np.maximum(read, 1)
print(f"\n{policies[-1]}: share of prompts with a deficit above 0.5 at positions 0, 1, 4: {share[[0, 1, 4]].round(2)}")

# %% Figure: deficit by position, harmful prompts against harmless ones
figure, axes = plt.subplots(figsize=(6, 3.2))
for kind, measured in diagnosis["kinds"].items():
    for policy in policies:
        deficit = measured["profile"][policy]["deficit"]
        mean, low, high = (np.array(deficit[key], dtype=float) for key in ("mean", "low", "high"))
        (line,) = axes.plot(mean, label=f"{policy}, {kind}", linestyle="-" if kind == "harmful" else ":")
        axes.fill_between(np.arange(len(mean)), low, high, color=line.get_color(), alpha=0.2)
axes.plot(positions, share, color="gray", linewidth=0.8, label=f"{policies[-1]}: share of prompts above 0.5")
axes.set(xlabel="position in the response", ylabel="deficit", ylim=(-0.02, 1.02))
axes.legend(fontsize=8)
figure.tight_layout()
figure.savefig(folder / "deficit.png", dpi=150)
print(f"figure: {folder / 'deficit.png'}")
