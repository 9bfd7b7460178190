"""Names of others in tables: escaped for Markdown, TeX and spreadsheets, so that they are shown and never obeyed."""

import re
import unicodedata

TEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"Δ": r"$\Delta$", "±": r"$\pm$", "≈": r"$\approx$", "×": r"$\times$", "−": "$-$", "<": "$<$", ">": "$>$"},
}
_MARKDOWN = re.compile(r"\\(?=[!-/:-@\[-`{-~]|$)|[<&`*|]|(?<=\])[(\[:]")
"""Text that Markdown would obey: HTML, entities, code, emphasis, cells, links; backslashes that would escape."""


def one_line(text: object) -> str:
    """Write text in one line without control characters, which terminals would obey, or marks that turn it round."""
    spaced = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", str(text))
    return "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def markdown(text: object) -> str:
    """Escape text for Markdown: it shows as it is, in one line, in or outside of a table."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", one_line(text))


def tex(text: object) -> str:
    """Escape text for TeX: its special characters, a hyphen before a number as minus, unknown non-ASCII as "?"."""
    escaped = "".join(TEX.get(character, character) for character in one_line(text))
    escaped = re.sub(r"(?<!\w)-(?=\d|inf)", "$-$", escaped)
    return "".join(character if character.isascii() else "?" for character in escaped)


def after_tex_break(line: str) -> str:
    r"""Guard a line of TeX that follows a `\\` or a rule, which would take a bracket or star for its argument."""
    return "{}" + line if line.lstrip().startswith(("[", "*")) else line


def spreadsheet(value: object) -> object:
    """Guard a CSV cell: text that a spreadsheet would compute (=, +, -, @ first) gets an apostrophe; numbers stay."""
    if not isinstance(value, str):
        return value
    value = re.sub(r"\r\n?", "\n", value)  # csv writes a bare \r without quotes, as if it ended the row
    first = unicodedata.normalize("NFKC", value.lstrip())[:1]  # full-width signs count as well
    return f"'{value}" if first in ("=", "+", "-", "@") or value[:1] in ("\t", "\r", "\n") else value
