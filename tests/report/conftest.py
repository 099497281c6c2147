"""A synthetic run folder with everything in it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from raycomplete.report.html import write_report

DEPTHS = (0, 4, 8, 16, 32, 64)
N = 100
COMPLIED = {"base": (89, 92, 93, 93, 95, 96), "aligned": (43, 80, 88, 91, 93, 98), "student": (42, 8, 5, 4, 5, 14)}


def a_rate(successes: int, n: int) -> dict[str, Any]:
    """A rate with a made-up interval, wide enough to be seen."""
    share = successes / n
    return {"rate": share, "n": n, "low": max(0.0, share - 0.08), "high": min(1.0, share + 0.08)}


def a_result(role: str, n: int = N, depths: tuple[int, ...] = DEPTHS) -> dict[str, Any]:
    """The result that an evaluation leaves for one model."""
    variants: dict[str, Any] = {}
    by_depth = {}
    for depth, complied in zip(depths, COMPLIED[role], strict=False):
        complied = min(complied, n)
        incoherent, empty = min(depth // 16, n - complied), min(1 + depth // 32, max(0, n - complied - depth // 16))
        outcomes = {
            "complied": complied,
            "incoherent": incoherent,
            "empty": empty,
            "refused": n - complied - incoherent - empty,
        }
        by_depth[str(depth)] = a_rate(complied, n)
        variants[f"prefill-{depth}"] = {
            "n": n,
            "outcomes": outcomes,
            "depth": depth,
            "asr": by_depth[str(depth)],
            "short_answers": 7 if depth == 64 else 0,
            "max_tokens": 64,
            "seconds": 1.5,
        }
    mean = sum(rate["rate"] for rate in by_depth.values()) / len(by_depth)
    variants["benign"] = {"n": n, "outcomes": {"complied": n, "refused": 0, "incoherent": 0, "empty": 0}}
    return {
        "role": role,
        "model_id": f"sha256:{role}",
        "judge": "refusal-patterns-v4",
        "judge_measured": {
            "on": "a test",
            "sensitivity": a_rate(76, 100),
            "specificity": a_rate(95, 100),
            "on_topic": {"by": "a sentence encoder", "kept": a_rate(99, 100), "found": a_rate(91, 100)},
            "traps": {"held_out": dict.fromkeys(("right", "compliance", "no_compliance"), a_rate(53, 59))},
        },
        "settings": {"depths": list(depths), "max_tokens": 64, "temperature": 0.0},
        "asr": {"by_depth": by_depth, "mean": a_rate(round(100 * mean), 100)},
        "variants": variants,
        "utility": a_rate(n - 3, n),
        "over_refusal": a_rate(n // 3, n),
        "benign_refusal": a_rate(2, n),
        "outcomes": {name: variant["outcomes"] for name, variant in variants.items()},
        "attacks": {
            name: {
                "mean": a_rate(round(100 * mean) // part, 100),
                "worst_of_n": a_rate(round(100 * mean), 100),
                "n": n,
                "trials": n,
                "reduced": False,
                "reduced_because": [],
                "corrected": None,
            }
            for part, name in enumerate(("prefill", "gcg", "random_search"), start=1)
        },
    }


def a_summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """summary.json of these results."""
    return {
        "name": "synthetic <run> & co",
        "asr": {role: result["asr"] for role, result in results.items()},
        "asr_reduction": 0.84,
        "utility": {role: result["utility"] for role, result in results.items()},
        "over_refusal": {role: result["over_refusal"] for role, result in results.items()},
        "over_refusal_by_source": {
            source: {role: result["over_refusal"] for role, result in results.items()}
            for source in ("xstest_prompts", "jbb_benign_behaviors")
        },
        "benign_nll": {
            role: {"nats_per_token": 0.4214, "low": 0.389, "high": 0.455, "n": 50, "tokens": 2000} for role in results
        },
        "judge": "refusal-patterns-v4",
        "train": {"steps": 120, "seconds": 50.2, "tokens_per_s": 12345.6, "teacher_wait_fraction": 0.04},
        "versions": {"raycomplete": "0.1.0", "ray": "2.60.0"},
    }


def a_step(step: int) -> dict[str, Any]:
    """One row of metrics.jsonl."""
    bins = [[1, 8], [9, 16], [17, 24], [25, 32], [33, 40], [41, 48], [49, 56], [57, 64]]
    weights = [math.exp(-((place - step / 17) ** 2) / 8) + 0.2 for place in range(len(bins))]
    recovery = 3.0 * math.exp(-step / 25) + 0.05
    anchor, push_forward = 0.02 + 0.0004 * step, 0.3 * math.exp(-step / 12) if step < 90 else 0.0
    measured = {"validation": a_validation(step)} if step % 20 == 0 else {}
    return measured | {
        "step": step,
        "loss": anchor + recovery + push_forward,
        "anchor": anchor,
        "recovery": recovery,
        "push_forward": push_forward,
        "unfinished_mass": 0.5 / step,
        "grad_norm": 1.0,
        "lr": 5e-5,
        "depth_mean": 30.0,
        "depth_probabilities": [weight / sum(weights) for weight in weights],
        "depth_loss": [None] * len(bins),
        "depth_bins": bins,
    }


def a_validation(step: int) -> dict[str, Any]:
    """A measurement on held-back prompts."""
    return {
        "compliance": {"0": 0.1, "8": 0.5 - step / 300, "32": max(0.9 - step / 100, 0.0)},
        "compliance_n": {"0": 24, "8": 24, "32": 24},
        "over_refusal": 0.02,
        "over_refusal_changed": 2,
        "over_refusal_n": 24,
        "in_reach": 0.3,
        "unfinished_mass": 0.2,
        "kl": 0.11 - step / 2000,
        "of_budget": {"over_refusal": 0.5, "kl": 1.1 - step / 200},
        "meets_budgets": step > 20,
        "best_step": step,
        "factors": {"anchor": 1.0 + step / 100, "push_forward": 1.0 - step / 300},
    }


TRAINING = {
    "steps": 120,
    "terms": {
        "anchor": {"label": "anchor", "description": "nats from aligned along its own answers", "metrics": {}},
        "recovery": {"label": "recovery", "description": "nats from aligned's refusal", "metrics": {}},
        "push_forward": {
            "label": "push-forward",
            "description": "divergence along h from what aligned says at once",
            "metrics": {"unfinished_mass": "the student's probability of those tokens"},
        },
    },
}


def a_profile(num_positions: int = 64) -> dict[str, Any]:
    """profile.json."""
    at = range(num_positions)
    kl = {"aligned": [2.5 * math.exp(-t / 4) + 0.05 for t in at], "student": [1.8 + 0.4 * math.cos(t / 9) for t in at]}
    return {
        "positions": list(at),
        "tau": 0.01,
        "kappa": 0.5,
        **{
            role: {
                "unfinished_mass": [0.5 * math.exp(-value) for value in values],
                "kl_to_base": values,
                "deficit": [math.exp(-value / 0.5) for value in values],
                "n": [100 - t for t in at],
            }
            for role, values in kl.items()
        },
    }


def a_curve(means: list[float], low: float = 0.0) -> dict[str, Any]:
    """Means with a made-up interval; the last position is reached by one prompt."""
    return {
        "mean": means,
        "low": [*(max(low, mean - 0.05) for mean in means[:-1]), None],
        "high": [*(mean + 0.05 for mean in means[:-1]), None],
    }


def a_diagnosis(num_positions: int = 200, roles: tuple[str, ...] = ("aligned", "student")) -> dict[str, Any]:
    """diagnosis.json."""
    at = range(num_positions)
    kl = {
        ("aligned", "harmful"): [2.5 * math.exp(-t) + 0.05 for t in at],
        ("aligned", "benign"): [0.1 + 0.02 * math.sin(t) for t in at],
        ("student", "harmful"): [3.0 + 0.4 * math.cos(t / 9) for t in at],
        ("student", "benign"): [0.15 + 0.02 * math.sin(t) for t in at],
    }
    kinds = {}
    for kind in ("harmful", "benign"):
        profiles = {
            role: {
                "n": [60 - t // 5 for t in at],
                "kl_to_base": a_curve(kl[role, kind]),
                "deficit": a_curve([math.exp(-value / 0.5) for value in kl[role, kind]]),
                "base_favored_mass": a_curve([1 - math.exp(-value) for value in kl[role, kind]]),
                "unfinished_mass": a_curve([math.exp(-value) for value in kl[role, kind]]),
                "base_favored_count": a_curve([4 * value for value in kl[role, kind]]),
                "agreement": a_curve([math.exp(-value) for value in kl[role, kind]]),
                "refusal_probability": a_curve([0.3 * (1 - math.exp(-value)) for value in kl[role, kind]]),
            }
            for role in roles
        }
        depth = {"low": 1, "high": 2, "halves": [1, 2], "threshold": 0.5, "num_positions": num_positions}
        beyond = depth | {"depth": None, "low": 150, "high": None, "halves": [None, 170]}
        kinds[kind] = {
            "prompts": 64,
            "measured": 60,
            "tokens": 9000,
            "profile": profiles,
            "completion_depth": {role: beyond if role == "student" else depth | {"depth": 1} for role in roles},
        }
    norms = {
        name: {**a_curve([scale * math.exp(-t / 6) + 0.01 for t in range(24)]), "n": [30] * 24}
        for name, scale in (("sft_head", 50.0), ("sft_logits", 1.0), ("rejected_head", 20.0))
    }
    token = {
        "kind": "harmful",
        "role": "aligned",
        "band": [0, 0],
        "token": " sure\n",
        "token_id": 7,
        "share": 0.8,
        "count": 50,
        "base_probability": 0.7,
        "policy_probability": 0.1,
        "position": 0,
        "context": "••• <b>",
    }
    return {
        "name": "synthetic-diagnosis",
        "policies": list(roles),
        "settings": {"threshold": 0.5, "kappa": 0.5, "tau": 0.01, "margin": 0.05, "show_harmful": False, "harmful": []},
        "intervals": "made up",
        "refusal_tokens": ["I", "Sorry"],
        "kinds": kinds,
        "tokens": [token, {**token, "band": [1, 3], "token": ""}, {**token, "kind": "benign"}],
        "gradient": {"pairs": 30, "roles": {role: {**norms, "preference_factor": 0.05} for role in ("base", *roles)}},
        "versions": {"raycomplete": "0.1.0"},
    }


@pytest.fixture
def diagnosis_folder(tmp_path: Path) -> Path:
    """A diagnosis alone."""
    folder = tmp_path / "synthetic-diagnosis"
    folder.mkdir()
    (folder / "diagnosis.json").write_text(json.dumps(a_diagnosis()))
    return folder


def fill_run_folder(tmp_path: Path) -> Path:
    """Writes a whole run into a folder."""
    results = {role: a_result(role) for role in COMPLIED}
    (tmp_path / "evaluation").mkdir()
    for role, result in results.items():
        (tmp_path / "evaluation" / f"{role}.json").write_text(json.dumps(result))
    (tmp_path / "summary.json").write_text(json.dumps(a_summary(results)))
    (tmp_path / "profile.json").write_text(json.dumps(a_profile()))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(a_step(step)) + "\n" for step in range(1, 121)))
    (tmp_path / "training.json").write_text(json.dumps(TRAINING))
    (tmp_path / "config.yaml").write_text("train:\n  steps: 120\n")
    return tmp_path


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A whole run."""
    return fill_run_folder(tmp_path)


@pytest.fixture(scope="session")
def written_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with its report, which takes seconds to draw; only to be read."""
    folder = fill_run_folder(tmp_path_factory.mktemp("written"))
    write_report(folder)
    return folder
