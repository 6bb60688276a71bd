import pytest

from gnpractical.runs.errors import in_one_line


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("a must be 1, got 2"), "error: a must be 1, got 2"),
        (ValueError("two\n  lines"), "error: two lines"),
        (FileNotFoundError(2, "No such file or directory", "a.pth"), "error: [Errno 2] No such"),
        (
            ValueError(
                "Caught ValueError\nTraceback (most recent call last):\n  x\nValueError: odd"
            ),
            "error: odd",
        ),
        (KeyError("depth"), "error: KeyError: 'depth' (GNPRACTICAL_DEBUG=1 shows where)"),
        (RuntimeError(), "error: RuntimeError: RuntimeError (GNPRACTICAL_DEBUG=1 shows where)"),
    ],
)
def test_one_line(monkeypatch, error, line):
    monkeypatch.delenv("GNPRACTICAL_DEBUG", raising=False)
    with pytest.raises(SystemExit) as exit, in_one_line():
        raise error
    assert str(exit.value).startswith(line) and "\n" not in str(exit.value)
    monkeypatch.setenv("GNPRACTICAL_DEBUG", "1")
    with pytest.raises(type(error)), in_one_line():
        raise error


def test_an_interruption_needs_no_words():
    with pytest.raises(SystemExit) as exit, in_one_line():
        raise KeyboardInterrupt
    assert exit.value.code == 130
