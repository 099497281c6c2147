"""The reference of the run file that is generated from its fields."""

from __future__ import annotations

import re

import yaml

from raycomplete.attacks.registry import ATTACKS
from raycomplete.config import dump, parse
from raycomplete.config.reference import markdown
from raycomplete.methods.registry import METHODS, Method

MINIMAL = {"models": {"base": "organism:base", "aligned": "organism:aligned"}, "data": {"source": "organism"}}


def test_every_key_of_a_run_file_is_in_the_reference() -> None:
    text = markdown()
    tree = yaml.safe_load(dump(parse(MINIMAL, "here")))
    sections = {section: re.findall(r"^\| `(\w+)` \|", body, re.MULTILINE) for section, body in tables(text).items()}
    for name, values in tree.items():
        if isinstance(values, dict):
            assert set(values) == set(sections[f"`{name}`"])
        else:
            assert f"| `{name}` |" in text


def tables(text: str) -> dict[str, str]:
    """Each part of the reference by its heading."""
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_a_row_says_what_a_value_may_be_and_what_it_is_by_default() -> None:
    parts = tables(markdown())
    assert "| `base` | text | required | the model before safety alignment |" in parts["`models`"]
    assert "| `max_length` | integer, ≥ 16 | `1024` |" in parts["`models`"]
    assert '| `every` | integer or `auto` | `"auto"` |' in parts["`train.validation`"]
    assert "| `depths` | list of integer | `[0, 4, 8, 16, 32, 64, 100, 200, 500]` |" in parts["`evaluation`"]
    assert "The same at `data.train.benign[]`" in parts["`data.train.harmful[]`"]


def test_every_method_has_a_table_of_its_settings() -> None:
    parts = tables(markdown())
    assert '| `token_weights` | `exp`, `sigmoid` | `"exp"` |' in parts["Method `w_door`"]
    assert "`anchor_batch_size` is `64`, `depth.max` is `100`" in parts["Method `augmentation`"]
    for name, method in METHODS.items():
        heading = "`method`" if name == "completion" else f"Method `{name}`"
        shared = set() if name == "completion" else set(Method.model_fields)
        for field in set(method.model_fields) - shared:
            assert f"| `{field}` |" in parts[heading]


def test_every_attack_has_a_table_of_its_settings() -> None:
    parts = tables(markdown())
    for name, attack in ATTACKS.items():
        own = parts[f"Attack `{name}`"]
        several = "".join(text for heading, text in parts.items() if heading.startswith("Attacks") and name in heading)
        for field, found in attack.config_class.model_fields.items():
            assert found.description is None or f"| `{field}` |" in own + several


def test_every_setting_has_a_meaning() -> None:
    """Sections explain themselves by their docstrings."""
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert [row for row in rows if row.endswith("|  |")] == []
