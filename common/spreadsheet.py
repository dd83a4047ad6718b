"""Cells of a CSV that people open in a spreadsheet: no text is taken for a formula."""

import re

# What spreadsheets evaluate, by OWASP's page on CSV injection; quotes may stand before it already.
FORMULA = re.compile("'*[=+\\-@\t\r\n＝＋－＠]")


def protect(text: str) -> str:
    """Put a quote before a text that a spreadsheet would evaluate.

    >>> protect("=1+1"), protect("'=1"), protect("'tis"), protect("clip-1")
    ("'=1+1", "''=1", "'tis", 'clip-1')
    """
    return f"'{text}" if FORMULA.match(text) else text


def unprotect(cell: str) -> str:
    """The text that `protect` was given.

    >>> unprotect("'=1+1"), unprotect("''=1"), unprotect("'tis"), unprotect("=1")
    ('=1+1', "'=1", "'tis", '=1')
    """
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell
