"""The page in the documentation has the rows that are tested, and no others."""

from bad_input.table import PAGE, page


def test_the_page_is_written_from_the_tested_rows():
    assert PAGE.read_text(encoding="utf-8") == page()
