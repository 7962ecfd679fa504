"""The exception tree."""

import re

from lookonce import errors


def drawn_tree() -> dict[str, set[str]]:
    """Each class of the drawing in the module's docstring, and the bases that the drawing gives it."""
    bases: dict[str, set[str]] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ([│├└─ ]*)(\w+Error)\b(?: \(also (\w+)\))?", line)
        if found is None:
            continue
        depth = len(found[1]) // 4
        above[depth:] = [found[2]]
        bases[found[2]] = {above[depth - 1] if depth else "Exception"} | ({found[3]} if found[3] else set())
    return bases


def test_the_drawn_tree_is_the_tree_of_the_classes() -> None:
    classes = {name: {base.__name__ for base in getattr(errors, name).__bases__} for name in errors.__all__}
    assert len(classes) == 14
    assert drawn_tree() == classes


def test_all_names_every_class_of_the_module() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert set(errors.__all__) == defined


def test_bad_input_is_a_value_error_and_a_native_failure_is_not() -> None:
    assert issubclass(errors.PictureError, ValueError)
    assert not issubclass(errors.NativeError, ValueError)


def test_a_native_error_ends_with_the_native_lines() -> None:
    error = errors.NativeError("it failed", ("one", "two"))
    assert str(error) == "it failed: one | two"
    assert error.log == ("one", "two")
    assert str(errors.NativeError("it failed")) == "it failed"
