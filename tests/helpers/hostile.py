"""Values that strangers may put into files: JSON of any type and depth, names that markup and shells would obey."""

from hypothesis import strategies as st

NAMES = [
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a|b", "[x](javascript:alert(1))", "![x](http://x)"),
    *(
        "line\nbreak",
        "\\input{secret}",
        "50%\n\\input{secret}",
        "`code`",
        "**best**",
        "&lt;",
        "\\<b>",
        "\x1b[2J",
        "[1cm]",
    ),
    *("=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "＝1", " =1", "@DATA@", "@SCRIPT@", "*", "\\"),
]
scalars = st.one_of(
    *(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False)),
    *(st.sampled_from([*NAMES, "nan", "inf", "", "gptq"]), st.text(max_size=8)),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
"""Any JSON."""


def nested(depth: int, end: object = 1) -> object:
    """A list in a list in a list …"""
    for _ in range(depth):
        end = [end]
    return end


def changed(tree, path, value):
    """A copy of nested maps and lists with the value at `path` replaced."""
    if not path:
        return value
    if isinstance(tree, dict):
        return tree | {path[0]: changed(tree.get(path[0]), path[1:], value)}
    return [changed(item, path[1:], value) if at == path[0] else item for at, item in enumerate(tree)]


def places(tree, path=()):
    """The path of every value in nested maps and lists."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))
