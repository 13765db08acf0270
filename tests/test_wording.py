"""Errors of libraries in one line, also of those that say nothing."""

from nnunet_flare.wording import first_line


def test_an_error_without_words_is_named_by_its_kind():
    assert first_line(AssertionError()) == "AssertionError"
    assert first_line(RuntimeError("\n one\ntwo")) == "one"
