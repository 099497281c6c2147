from pathlib import Path

from raycomplete.runtime.row_store import RowStore, content_hash


def test_rows_survive(tmp_path: Path) -> None:
    path = tmp_path / "a" / "rows.jsonl"
    store = RowStore(path, mode=0o600)
    assert not path.exists(), "nothing is written before there is something to say"
    store.add([{"key": "x", "value": 1}, {"key": "y", "value": 2}])
    store.add([{"key": "x", "value": 3}])
    assert path.stat().st_mode & 0o777 == 0o600
    again = RowStore(path)
    assert (again["x"]["value"], again["y"]["value"]) == (1, 2)
    assert "z" not in again
    assert again.get("z") == {}


def test_whatever_a_killed_process_leaves_is_repaired(tmp_path: Path) -> None:
    """Cut after every byte: whole lines are kept, the torn one is dropped, and what is added later can be read."""
    path = tmp_path / "rows.jsonl"
    RowStore(path).add({"key": key, "value": key * 3} for key in "ab")
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        store = RowStore(path)
        kept = [key for key in "ab" if key in store]
        assert kept == list("ab")[: whole[:cut].count(b"}")]
        store.add([{"key": "c", "value": "new"}])
        assert [key for key in "abc" if key in RowStore(path)] == [*kept, "c"]


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first, second = RowStore(path), RowStore(path)
    first.add([{"key": "a"}])
    second.add([{"key": "b"}])
    first.add([{"key": "c"}])
    assert all(key in RowStore(path) for key in "abc")


def test_hash_names_content() -> None:
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
