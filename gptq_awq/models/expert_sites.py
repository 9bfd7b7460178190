"""Sites of experts: which linears only some tokens reach, and what the others of their make look like.

A few tokens reach a few experts. Names of one expert's linears differ from another's in one integer, so what was seen
of the experts that a probe reached holds for all: `completed` gives every expert its sites, expert by expert, as
forwards visit them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gptq_awq.models.linear import Site

Family = tuple[str, ...]
"""A name's parts, "*" in place of one integer."""


@dataclass(frozen=True)
class Seen:
    """A site as a probe saw it, and how many tokens arrived."""

    site: Site
    tokens: int


def completed(seen: Sequence[Seen], widths: Mapping[str, int], tokens: int) -> list[Site]:
    """All sites of a block in the order they run, those of experts that no token reached among them.

    Args:
        seen: in the order they ran.
        widths: columns of every linear in the block, by name.
        tokens: how many entered the block.

    Returns:
        Sites of experts have their `expert`. A linear that is neither seen nor like one that was has none.
    """
    members = _members(widths)
    routed = _routed_families(seen, members, widths, tokens)
    sites: list[Site] = []
    done: set[tuple[Family, ...]] = set()
    for visit in _visits(seen, routed):
        if not isinstance(visit, list):
            sites.append(visit)
            continue
        template = tuple(family for site in visit for family in _families(site, routed))
        if template in done:
            continue
        done.add(template)
        for number in sorted(members[template[0]]):
            sites += [_of_expert(site, number, routed) for site in visit]
    return sites


def alike(one: Site, other: Site) -> int | None:
    """Which part of the names differs, where two sites are those of two experts; None where they aren't."""
    if one.expert is None or other.expert is None or len(one.linears) != len(other.linears):
        return None
    holes: set[int] = set()
    for a, b in zip(one.linears, other.linears, strict=True):
        parts = a.split("."), b.split(".")
        if len(parts[0]) != len(parts[1]):
            return None
        holes |= {i for i, (x, y) in enumerate(zip(*parts, strict=True)) if x != y}
    hole = holes.pop() if len(holes) == 1 else None
    return hole if hole is None or one.linears[0].split(".")[hole] == str(one.expert) else None


def like(found: Site, site: Site) -> Site:
    """Another expert's `site` with the absorber that was `found` for one of its make."""
    hole = alike(found, site)
    if found.absorber is None or hole is None:
        return site
    parts = found.absorber.producer.split(".")
    parts[hole] = str(site.expert)
    return replace(site, absorber=replace(found.absorber, producer=".".join(parts)), analogous=True)


def _of_expert(site: Site, number: int, routed: set[Family]) -> Site:
    linears = tuple(_named(family, number) for family in _families(site, routed))
    return Site(linears, site.width, expert=number)


def _routed_families(
    seen: Sequence[Seen], members: Mapping[Family, Sequence[int]], names: Iterable[str], tokens: int
) -> set[Family]:
    """Of linears that not every token reached, and that have others of their kind."""
    reached = {linear: each.tokens for each in seen for linear in each.site.linears}
    some = {family for name in reached for family in _open(name) if len(members[family]) > 1}
    found: set[Family] = set()
    for name in names:
        known = [family for family in _open(name) if family in some]
        if reached.get(name, 0) < tokens and known:
            found.add(max(known, key=lambda family: len(members[family])))
    return found


def _members(names: Iterable[str]) -> dict[Family, list[int]]:
    """The numbers of every family's members."""
    members: dict[Family, list[int]] = {}
    for name in names:
        for family in _open(name):
            members.setdefault(family, []).append(int(name.split(".")[family.index("*")]))
    return members


def _open(name: str) -> Iterator[Family]:
    """The families a name may belong to: one for each of its integers."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            yield (*parts[:i], "*", *parts[i + 1 :])


def _number(name: str, family: Family) -> int | None:
    parts = name.split(".")
    if len(parts) != len(family):
        return None
    hole = family.index("*")
    same = all(a == b for i, (a, b) in enumerate(zip(parts, family, strict=True)) if i != hole)
    return int(parts[hole]) if same and parts[hole].isdecimal() else None


def _named(family: Family, number: int) -> str:
    return ".".join(str(number) if part == "*" else part for part in family)


def _families(site: Site, routed: set[Family]) -> list[Family]:
    """Of a site's linears; none where it is an ordinary one."""
    return [family for name in site.linears for family in _open(name) if family in routed]


def _visits(seen: Sequence[Seen], routed: set[Family]) -> Iterator[Site | list[Site]]:
    """Ordinary sites one by one, and the sites of one expert that ran one after the other together."""
    visit: list[Site] = []
    now: int | None = None
    for each in seen:
        families = _families(each.site, routed)
        number = _number(each.site.linears[0], families[0]) if families else None
        if visit and number != now:
            yield visit
            visit = []
        now = number
        if number is None:
            yield each.site
        else:
            visit.append(each.site)
    if visit:
        yield visit
