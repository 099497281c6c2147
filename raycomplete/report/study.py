"""The numbers of a study: rates of every method over its seeds, differences from aligned and from rivals, costs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raycomplete.config.defences import ContrastiveDefence, SafeDecodingDefence
from raycomplete.config.study import BASE, FROZEN, Study, StudyRun
from raycomplete.evaluation.statistics import difference_over_runs, mean_over_runs
from raycomplete.evaluation.summary import OTHER_RATES, reasons_by_role, reductions
from raycomplete.report.run_folder import RunFolder, read_run_folder
from raycomplete.report.runs import Shares, shares_by_measure
from raycomplete.runtime.errors import DataError

MEAN_OVER_ATTACKS = "ASR, mean over attacks"
OVER_REFUSAL = "over-refusal"
SPARE_OVER_REFUSAL = 0.02  # by which a rival may refuse more harmless prompts than the reference and still be compared
_STUDENT = "student"
_NOT_ATTACKS = tuple(label.removesuffix(" (borderline)") for label in OTHER_RATES.values())
_CUT = re.compile(r" \(\d+ of \d+ cut\)$")  # of answers; the counts differ between seeds
_APART = ("off_topic", "incoherent")  # outcomes that are success of nobody

Row = dict[str, Any]


def study_results(study: Study, finished: Sequence[StudyRun]) -> dict[str, Any]:
    """Computes study.json from the folders of finished runs.

    Returns:
        By model: `rows` by label, first base and aligned, each with `seeds`, `rates` by measure
        (`raycomplete.evaluation.statistics.mean_over_runs`), `against_aligned` by measure (`difference_over_runs`),
        `cost` and `departures`, and the reference's also with `against_rivals` by rival and measure and `best_rival`,
        a label by attack; `judge`; and `reduced`, pairs of an attack and why its rates are less than those of
        published runs, with the labels of the rows of which it is true if not all. A model whose frozen models are not
        evaluated yet is left out.

    Raises:
        DataError: Runs of one model were judged by different judges, or on no common prompts.
    """
    models = {}
    for model in dict.fromkeys(run.model for run in study.runs):
        runs = [run for run in finished if run.model == model]
        if any(run.label == FROZEN for run in runs):
            models[model] = _of_model(study, runs)
    return {"name": study.config.output.name, "reference": study.reference, "models": models}


def _of_model(study: Study, runs: Sequence[StudyRun]) -> dict[str, Any]:
    folders = {run.config.output.folder: read_run_folder(run.config.output.folder) for run in runs}
    judges: dict[str, list[str]] = defaultdict(list)
    for path, folder in folders.items():
        judges[str(folder.summary.get("judge"))].append(path.name)
    if len(judges) > 1:
        named = "; ".join(f"{judge}: {', '.join(names)}" for judge, names in sorted(judges.items()))
        raise DataError(
            f"The runs of a study were judged by different judges: {named}.",
            "Delete summary.json of all that today's judge has not judged, and start the study with --resume: stored "
            "answers are judged anew, and none is generated twice.",
        )
    by_label: dict[str, list[tuple[StudyRun, RunFolder]]] = defaultdict(list)
    for run in runs:
        by_label[run.label].append((run, folders[run.config.output.folder]))
    ((frozen_run, frozen),) = by_label.pop(FROZEN)
    rows: dict[str, Row] = {}
    shares: dict[str, list[dict[str, Shares]]] = {}
    for role in (BASE, FROZEN):
        if role in frozen.results:
            shares[role] = [_shares(frozen_run.config.output.folder, frozen.results[role])]
            rows[role] = {"seeds": [], "apart": _apart([frozen.results[role]]), "cost": {}, "departures": []}
    is_alone = study.config.parallel == 1  # runs side by side slow each other
    plain = _seconds_per_token([frozen.results[FROZEN]]) if is_alone else None
    for label in (*study.config.methods, *study.config.defences):
        if not (found := by_label.get(label)):
            continue
        results = [folder.results[_STUDENT] for _, folder in found]
        shares[label] = [_shares(run.config.output.folder, folder.results[_STUDENT]) for run, folder in found]
        # Two models are decoded by transformers, whose seconds say nothing beside those of vLLM.
        has_two = isinstance(found[0][0].config.evaluation.defence, ContrastiveDefence | SafeDecodingDefence)
        rows[label] = {
            "seeds": [run.seed for run, _ in found if run.seed is not None],
            "apart": _apart(results),
            "cost": _cost([folder for _, folder in found], results, None if has_two else plain),
            "departures": list(found[0][0].departures),
        }
    try:
        _add_rates(rows, shares)
        _add_rivals(study.reference, rows, shares)
    except ValueError as error:
        raise DataError("Two runs of the study have no prompts in common.", "Evaluate all on the same data.") from error
    return {"rows": rows, "judge": next(iter(judges)), "reduced": _reduced(frozen, by_label)}


def _reduced(frozen: RunFolder, by_label: Mapping[str, Sequence[tuple[StudyRun, RunFolder]]]) -> list[tuple[str, str]]:
    """Pairs each attack with why its rates are less than standard, and with the rows of which it is true if not all."""
    models = [(role, role, frozen.summary) for role in (BASE, FROZEN)]
    models += [(label, _STUDENT, folder.summary) for label, found in by_label.items() for _, folder in found]
    told: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for label, role, summary in models:
        for name, by_role in reasons_by_role(summary).items():
            if role in by_role:
                reasons = [_CUT.sub(", some cut", reason) for reason in by_role[role]]
                told[name][label] += [reason for reason in reasons if reason not in told[name][label]]
    return reductions({**frozen.summary, "attacks": {}, "reduced_because": told})


def _shares(folder: Path, result: Mapping[str, Any]) -> dict[str, Shares]:
    """Shares of successful trials by measure and prompt; their mean over attacks is of prompts that all have asked."""
    found = shares_by_measure(str(folder), result, in_detail=False)
    attacks = [
        shares for measure, (shares, _) in found.items() if measure not in _NOT_ATTACKS and not _is_depth(measure)
    ]
    common = set.intersection(*(set(attack) for attack in attacks))
    mean = {prompt: sum(attack[prompt] for attack in attacks) / len(attacks) for prompt in common}
    return ({MEAN_OVER_ATTACKS: (mean, 1)} if mean else {}) | found


def _is_depth(measure: str) -> bool:
    return measure.startswith("ASR, depth ")


def depths_of(rates: Mapping[str, Any]) -> dict[int, str]:
    """Maps prefill depths to their measures, in order."""
    return {int(name.rpartition(" ")[2]): name for name in rates if _is_depth(name)}


def _add_rates(rows: Mapping[str, Row], shares: Mapping[str, list[dict[str, Shares]]]) -> None:
    for label, row in rows.items():
        row["rates"] = {
            measure: mean_over_runs([run[measure][0] for run in shares[label]], trials)
            for measure, (_, trials) in shares[label][0].items()
            if all(measure in run for run in shares[label])
        }
        if label not in (BASE, FROZEN):
            row["against_aligned"] = {
                measure: _difference(rows, shares, (label, FROZEN), measure)
                for measure in row["rates"]
                if measure in shares[FROZEN][0]
            }


def _difference(
    rows: Mapping[str, Row], shares: Mapping[str, list[dict[str, Shares]]], labels: tuple[str, str], measure: str
) -> dict[str, Any]:
    """Compares two rows on the seeds that both have; a row without seeds is the same under each of the other's."""
    seeds = _common_seeds(*(rows[label]["seeds"] for label in labels)) or [0]
    ours, theirs = (
        [shares[label][known.index(seed) if known else 0][measure][0] for seed in seeds]
        for label, known in ((label, rows[label]["seeds"]) for label in labels)
    )
    return difference_over_runs(ours, theirs)


def _common_seeds(ours: Sequence[int], theirs: Sequence[int]) -> list[int]:
    return [seed for seed in ours or theirs if seed in (theirs or ours)]


def _add_rivals(reference: str, rows: Mapping[str, Row], shares: Mapping[str, list[dict[str, Shares]]]) -> None:
    """Compares the reference with all rivals; each attack's best is one of those that refuse as little as it does."""
    if reference not in rows:
        return
    rates = rows[reference]["rates"]
    # Of a rival whose runs under the reference's seeds are not finished, nothing can be said yet.
    rows[reference]["against_rivals"] = found = {
        label: {name: _difference(rows, shares, (reference, label), name) for name in rates if name in row["rates"]}
        for label, row in rows.items()
        if label not in (reference, BASE, FROZEN) and _common_seeds(rows[reference]["seeds"], row["seeds"])
    }
    allowed = rates[OVER_REFUSAL]["rate"] + SPARE_OVER_REFUSAL + 1e-9 if OVER_REFUSAL in rates else 1.0  # .12 + .02
    rivals = {
        label: rows[label]["rates"]
        for label in found
        if rows[label]["rates"].get(OVER_REFUSAL, {"rate": 0.0})["rate"] <= allowed
    }
    rows[reference]["best_rival"] = {
        measure: min(having, key=lambda label: rivals[label][measure]["rate"])
        for measure in rates
        if measure not in _NOT_ATTACKS and (having := [label for label in rivals if measure in rivals[label]])
    }


def _apart(results: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of the answers to prefills that are off topic or babble: no success of the attack, and none of a model."""
    blocks = [result["attacks"]["prefill"] for result in results if "prefill" in result.get("attacks", {})]
    trials = sum(block["trials"] for block in blocks)
    return sum(block["outcomes"].get(name, 0) for block in blocks for name in _APART) / trials if trials else None


def _cost(folders: Sequence[RunFolder], results: Sequence[Mapping[str, Any]], plain: float | None) -> Row:
    """Steps that runs kept, and means over them, the time of a token against aligned's only where that is known."""
    trained = [folder.summary["train"] for folder in folders if folder.summary.get("train")]
    spoken = _seconds_per_token(results)
    counted = [result["defence"]["passes_per_token"] for result in results if result.get("defence")]
    passes = [count for count in counted if count is not None]  # answers that were all found again took none
    return {
        "kept_steps": [(run.get("kept_step") or {"step": run["steps"]})["step"] for run in trained],
        "train_seconds": sum(run["seconds"] for run in trained) / len(trained) if trained else 0.0,
        "train_tokens": sum(run["tokens"] for run in trained) / len(trained) if trained else 0.0,
        "steps": sum(run["steps"] for run in trained) / len(trained) if trained else 0.0,
        "seconds_per_token": spoken / plain if spoken is not None and plain else None,
        "passes_per_token": sum(passes) / len(passes) if passes else None if counted else 1.0,
    }


def _seconds_per_token(results: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds of the evaluation per token that was said to harmless prompts."""
    variants = [result["variants"][kind] for result in results for kind in ("benign", "borderline")]
    tokens = sum(variant.get("tokens", 0) for variant in variants)
    return sum(variant["seconds"] for variant in variants) / tokens if tokens else None
