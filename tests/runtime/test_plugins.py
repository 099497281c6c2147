"""Plugins: Python files of the user's that the run file names."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raycomplete.config import dump, load_run_file, parse
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.plugins import load_plugins, module_name
from tests.conftest import ROOT

MINIMAL = {"models": {"base": "organism:base", "aligned": "organism:aligned"}, "data": {"source": "organism"}}


def write(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("\n".join([*lines, ""]))
    return path


def run_file(folder: Path, *plugins: str) -> Path:
    return write(folder, "run.yaml", yaml.safe_dump(MINIMAL | {"plugins": list(plugins)}))


def test_a_run_file_imports_its_plugins_once_and_before_it_is_checked(tmp_path: Path) -> None:
    """The key that the plugin makes wrong would be found by the check: so it must have run by then."""
    count = tmp_path / "count"
    write(tmp_path, "mine.py", "from pathlib import Path", f"Path({str(count)!r}).open('a').write('once')")
    for _ in range(2):
        with pytest.raises(ConfigError, match="unknown key 'trian'"):
            load_run_file(run_file(tmp_path, "mine.py"), ["trian.steps=1"])
    config = load_run_file(run_file(tmp_path, "mine.py"))
    assert count.read_text() == "once"
    assert config.plugins == [tmp_path / "mine.py"], "absolute, whatever stood in the file"
    again = write(tmp_path, "dumped.yaml", dump(config))
    assert load_run_file(again) == config


def test_two_plugins_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for index, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        load_plugins([write(tmp_path / folder, "mine.py", f"VALUE = {index}")])
    values = [sys.modules[module_name(tmp_path / folder / "mine.py")].VALUE for folder in ("a", "b")]
    assert values == [0, 1]


def test_a_module_of_an_installed_package_is_a_plugin_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (installed := tmp_path / "installed" / "package_of_plugins").mkdir(parents=True)
    write(installed, "attacks.py", "VALUE = 3")
    write(installed, "broken.py", "", "raise ValueError('no')")
    monkeypatch.syspath_prepend(installed.parent)
    config = load_run_file(run_file(tmp_path, "package_of_plugins.attacks"))
    assert config.plugins == [Path("package_of_plugins.attacks")]
    assert sys.modules["package_of_plugins.attacks"].VALUE == 3
    assert load_run_file(write(tmp_path, "dumped.yaml", dump(config))) == config
    with pytest.raises(ConfigError, match=r"package_of_plugins\.broken failed while it was imported: ValueError: no"):
        load_run_file(run_file(tmp_path, "package_of_plugins.broken"))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("", "import nothing_of_this_name"), ":2 failed while it was imported: ModuleNotFoundError: No module named"),
        (("def f():", "    return 1 / 0", "f()"), ":2 failed while it was imported: ZeroDivisionError: division by"),
        (("", "", "raise ValueError('two\\nlines')"), ":3 failed while it was imported: ValueError: two lines."),
        (("x = 1", "y = ("), ":2 failed while it was imported: SyntaxError: '(' was never closed."),
        (("import json", "json.loads('{')"), ":2 failed while it was imported: JSONDecodeError: "),
    ],
)
def test_a_plugin_that_fails_is_refused_by_file_and_line(lines: tuple[str, ...], words: str, tmp_path: Path) -> None:
    path = write(tmp_path, "broken.py", *lines)
    with pytest.raises(ConfigError) as caught:
        load_run_file(run_file(tmp_path, "broken.py"))
    assert f"The plugin {path}{words}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert module_name(path) not in sys.modules


@pytest.mark.parametrize(
    ("plugins", "words"),
    [
        (["missing.py"], r"The plugin .*/missing\.py does not exist\. Check the path"),
        (["."], "does not exist"),
        (["run.yaml"], r"is not the name of a Python file \(\.py\)"),
        (["no_package.of_plugins"], "failed while it was imported: ModuleNotFoundError: No module named 'no_package'"),
        ("mine.py", "plugins must be a list of Python files or modules"),
        ([{"path": "mine.py"}], "plugins must be a list of Python files or modules"),
    ],
)
def test_what_is_no_plugin_is_refused(plugins: object, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", yaml.safe_dump(MINIMAL | {"plugins": plugins}))
    with pytest.raises(ConfigError, match=words) as caught:
        load_run_file(path)
    assert caught.value.exit_code == 2


def test_a_mapping_that_somebody_sent_imports_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "sent.py", "raise RuntimeError('imported')")
    parse(MINIMAL | {"plugins": [str(path)]}, "The request")
    assert module_name(path) not in sys.modules


def test_an_object_of_a_plugin_is_unpickled_by_a_process_that_never_heard_of_it(tmp_path: Path) -> None:
    """Training workers unpickle their job before they run a line of it."""
    path = write(tmp_path, "shape.py", "class Shape:", "    sides = 5")
    load_plugins([path])
    pickled = write(tmp_path, "pickled", "")
    pickled.write_bytes(pickle.dumps(sys.modules[module_name(path)].Shape()))
    program = (
        "import pickle, sys; shape = pickle.load(open(sys.argv[1], 'rb')); "
        "from raycomplete.runtime.plugins import load_plugins, module_name; from pathlib import Path; "
        "path = Path(sys.argv[2]); load_plugins([path]); "
        "assert type(shape) is sys.modules[module_name(path)].Shape; print(shape.sides)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(pickled), str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "5\n"
