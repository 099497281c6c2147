"""Rates of several runs of one configuration that differ in `train.seed`, as means over runs with their spread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from raycomplete.evaluation.statistics import difference_over_runs, mean_over_runs
from raycomplete.evaluation.summary import OTHER_RATES, PAIRS, attack_shares, difference_text, measure_text, rate_text
from raycomplete.report.run_folder import RunFolder, read_run_folder
from raycomplete.runtime.errors import ConfigError, DataError
from raycomplete.runtime.files import write_json
from raycomplete.runtime.section import without_none, without_removed
from raycomplete.runtime.types import MODEL_ROLES

_FREE = ("output", "train.seed", "evaluation")  # `evaluation` is compared as the evaluation itself recorded it
_SHOWN = 4  # differing keys that a refusal names
Shares = tuple[Mapping[str, float], float]  # share of successful trials by prompt, and trials of each


def aggregate_runs(folders: Sequence[Path], *, allow_differences: bool = False) -> dict[str, Any]:
    """Computes the rates of run folders that differ in `train.seed` alone."""
    runs = {str(folder): read_run_folder(folder) for folder in folders}
    settings = {folder: _settings(folder, run) for folder, run in runs.items()}
    seeds = {folder: found.pop("train.seed", None) for folder, found in settings.items()}
    differences = list(_differences(settings))
    if len(runs) < len(folders):
        raise ConfigError("A run folder is named twice.", "Name each once.")
    if not allow_differences:
        if differences:
            more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise ConfigError(
                f"The runs differ in more than their seed: {'; '.join(differences[:_SHOWN])}{more}.",
                "Name runs of one configuration, or add --allow-differences to take them together all the same.",
            )
        for first, second in combinations(seeds, 2):
            if seeds[first] == seeds[second]:
                raise ConfigError(
                    f"{first} and {second} have the same train.seed, {seeds[first]}: the second tells nothing new.",
                    "Name runs of different seeds, or add --allow-differences to take them together all the same.",
                )
    roles = [str(role) for role in MODEL_ROLES if all(role in run.results for run in runs.values())]
    if not roles:
        raise DataError("No model was evaluated in all of these runs.", "Run raycomplete evaluate on each.")
    shares = {role: [shares_by_measure(folder, run.results[role]) for folder, run in runs.items()] for role in roles}
    try:
        rates, comparisons = _rates(shares), _comparisons(shares)
    except ValueError as error:
        raise DataError(
            "The runs were not evaluated on the same prompts.", "Evaluate all with the same data.evaluation."
        ) from error
    return {
        "runs": list(runs),
        "seeds": list(seeds.values()),
        "differences": differences,
        "rates": rates,
        "comparisons": comparisons,
    }


def write_aggregate(aggregate: Mapping[str, Any], output: Path | None) -> Path:
    """Writes the result of `aggregate_runs` as JSON, beside the first run folder unless `output` names a file."""
    first = Path(aggregate["runs"][0])
    path = output or first.with_name(f"{first.resolve().name}-over-{len(aggregate['runs'])}-runs.json")
    write_json(path, dict(aggregate))
    return path


def run_tables(aggregate: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Makes a table for each model and each pair of models: title and rows, the header first; 80 columns are enough."""
    head = ["in %", "mean [95 %]", "sd", "min to max", "n"]
    runs, seeds = len(aggregate["runs"]), ", ".join(map(str, aggregate["seeds"]))
    of_roles: dict[str, list[list[str]]] = {}
    for measure, by_role in aggregate["rates"].items():
        for role, rate in by_role.items():
            of_roles.setdefault(role, [head]).append(_row(measure, rate_text(rate).replace(" %", ""), rate))
    tables = [(f"{role}, {runs} runs (train.seed {seeds})", rows) for role, rows in of_roles.items()]
    of_pairs: dict[str, list[list[str]]] = {}
    for found in aggregate["comparisons"]:
        pair = f"{found['first']} - {found['second']}"
        of_pairs.setdefault(pair, [head]).append(_row(found["measure"], difference_text(found), found))
    return tables + [(f"{pair}, points, same prompts", rows) for pair, rows in of_pairs.items()]


def _row(measure: str, value: str, found: Mapping[str, Any]) -> list[str]:
    low, high, sd = (f"{100 * found[key] + 0.0:.1f}".removesuffix(".0") for key in ("min", "max", "sd"))
    name, _, detail = measure.partition(", ")  # variants stand below their attack, in short
    return [f"- {detail}" if detail and name != "ASR" else measure, value, sd, f"{low} to {high}", str(found["n"])]


def _settings(folder: str, run: RunFolder) -> dict[str, Any]:
    """Everything that must be the same, and the seed, by dotted key."""
    if run.config is None:
        raise DataError(f"The run folder {folder} has no config.yaml.", "Name folders that raycomplete made.")
    tree = yaml.safe_load(run.config)
    if not isinstance(tree, dict):
        raise DataError(f"{folder}/config.yaml must hold a mapping.", "Name folders that raycomplete made.")
    found = {
        key: value
        for key, value in _flat(without_removed(tree))
        if key == "train.seed" or not any(key == free or key.startswith(f"{free}.") for free in _FREE)
    }
    found |= dict(_flat({"evaluation": run.summary.get("evaluation") or tree.get("evaluation")}))
    return found | {"judge": run.summary.get("judge")}


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", without_none(value)


def _differences(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Names each key in which a run differs from the first."""
    (first, ours), *others = settings.items()
    for key in dict.fromkeys(key for found in settings.values() for key in found):
        for folder, theirs in others:
            if ours.get(key) != theirs.get(key):
                yield f"{key} is {ours.get(key)!r} in {first} and {theirs.get(key)!r} in {folder}"
                break


def shares_by_measure(folder: str, result: Mapping[str, Any], *, in_detail: bool = True) -> dict[str, Shares]:
    """Reads what the result of one model holds prompt by prompt, by measure: the shares, and the trials of a prompt.

    In detail, attacks of several trials have their worst of n too, and those with a headline their other variants. What
    no prompt was asked, such as a depth that no answer reaches, is left out.
    """
    if "by_prompt" not in result:
        raise DataError(
            f"{folder}/evaluation/{result['role']}.json does not say what happened at each prompt: an earlier version "
            "wrote it.",
            "Run raycomplete evaluate on that run again.",
        )
    attacks, by_prompt = result["attacks"], result["by_prompt"]
    found: dict[str, Shares] = {
        name.replace("prefill-", "ASR, depth "): (shares, 1)
        for name, shares in by_prompt.items()
        if name.startswith("prefill-")
    }
    for name, block in attacks.items():
        label = measure_text({"measure": "asr", "attack": name}) + " (worst of n)" * bool(block.get("rate_is_worst"))
        found[label] = shares, trials = attack_shares(block)
        if in_detail and name != "prefill" and trials > 1:
            found[f"{label}, worst of n"] = {prompt: float(share > 0) for prompt, share in shares.items()}, 1
        if in_detail:
            found |= {key: (by_prompt[key], 1) for key in by_prompt if key.startswith(f"{name}, ")}
    labels = {name: label.removesuffix(" (borderline)") for name, label in OTHER_RATES.items()}
    found |= {label: (by_prompt[name], 1) for name, label in labels.items()}
    return {label: measured for label, measured in found.items() if measured[0]}


def _rates(shares: Mapping[str, Sequence[Mapping[str, Shares]]]) -> dict[str, dict[str, Any]]:
    rates: dict[str, dict[str, Any]] = {}
    for role, runs in shares.items():
        for measure in [name for name in runs[0] if all(name in run for run in runs)]:
            trials = min(run[measure][1] for run in runs)
            rates.setdefault(measure, {})[role] = mean_over_runs([run[measure][0] for run in runs], trials)
    return rates


def _comparisons(shares: Mapping[str, Sequence[Mapping[str, Shares]]]) -> list[dict[str, Any]]:
    found = []
    for first, second in PAIRS:
        ours, theirs = shares.get(first, ()), shares.get(second, ())
        if not (ours and theirs):
            continue
        for measure in [name for name in ours[0] if all(name in run for run in (*ours, *theirs))]:
            change = difference_over_runs([run[measure][0] for run in ours], [run[measure][0] for run in theirs])
            found.append({"measure": measure, "first": first, "second": second, **change})
    return found
