"""Sites of experts: the linears that only some tokens reach, inferred for all experts from those that a probe reached.

A short probe reaches only a few experts. The names of two experts' linears differ in one integer, so the sites observed
in one expert hold for all: `completed` gives every expert its sites, expert by expert, in the order that forwards visit
them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gptq_awq.models.linear import Site

Family = tuple[str, ...]
"""A linear's name, split at its dots, with "*" in place of one integer: names that experts of one kind share."""


@dataclass(frozen=True)
class Seen:
    """A site as observed in a probe, and the number of tokens that reached it."""

    site: Site
    tokens: int


def completed(seen: Sequence[Seen], widths: Mapping[str, int], tokens: int) -> list[Site]:
    """All sites of a block in the order they run, including those of experts that no token reached.

    Args:
        seen: observed sites, in the order they ran.
        widths: number of columns of every linear in the block, by name.
        tokens: number of tokens that entered the block.

    Returns:
        The sites; those of experts have `expert` set. A linear that was neither observed nor belongs to the family of
        an observed one is in no site.
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
            of_expert = [_of_expert(site, number, routed) for site in visit]
            sites += [site for site in of_expert if widths.keys() >= set(site.linears)]
    return sites


def alike(one: Site, other: Site) -> int | None:
    """Index of the name part (the expert's number) by which the sites of two experts differ; None for other pairs."""
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
    """Give `site` of one expert the absorber of the alike site `found` of another expert."""
    hole = alike(found, site)
    if found.absorber is None or hole is None:
        return site
    parts = found.absorber.producer.split(".")
    parts[hole] = str(site.expert)
    return replace(site, absorber=replace(found.absorber, producer=".".join(parts)), analogous=True)


def _of_expert(site: Site, number: int, routed: set[Family]) -> Site:
    """The site of expert `number` that is like `site` of another expert."""
    linears = tuple(_named(family, number) for family in _families(site, routed))
    return Site(linears, site.width, expert=number)


def _routed_families(
    seen: Sequence[Seen], members: Mapping[Family, Sequence[int]], names: Iterable[str], tokens: int
) -> set[Family]:
    """Families with more than one member whose linears not every token reached: the experts'."""
    reached = {linear: each.tokens for each in seen for linear in each.site.linears}
    some = {family for name in reached for family in _open(name) if len(members[family]) > 1}
    found: set[Family] = set()
    for name in names:
        known = [family for family in _open(name) if family in some]
        if reached.get(name, 0) < tokens and known:
            found.add(max(known, key=lambda family: len(members[family])))
    return found


def _members(names: Iterable[str]) -> dict[Family, list[int]]:
    """Map each family to the numbers of its members."""
    members: dict[Family, list[int]] = {}
    for name in names:
        for family in _open(name):
            members.setdefault(family, []).append(int(name.split(".")[family.index("*")]))
    return members


def _open(name: str) -> Iterator[Family]:
    """Families that a name may belong to: one for each integer in it."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            yield (*parts[:i], "*", *parts[i + 1 :])


def _number(name: str, family: Family) -> int | None:
    """The integer in a name that stands in place of the family's "*"; None for a name outside of the family."""
    parts = name.split(".")
    if len(parts) != len(family):
        return None
    hole = family.index("*")
    same = all(a == b for i, (a, b) in enumerate(zip(parts, family, strict=True)) if i != hole)
    return int(parts[hole]) if same and parts[hole].isdecimal() else None


def _named(family: Family, number: int) -> str:
    """Name of the family's member of that number."""
    return ".".join(str(number) if part == "*" else part for part in family)


def _families(site: Site, routed: set[Family]) -> list[Family]:
    """Families of experts that a site's linears belong to; empty for a site that every token reaches."""
    return [family for name in site.linears for family in _open(name) if family in routed]


def _visits(seen: Sequence[Seen], routed: set[Family]) -> Iterator[Site | list[Site]]:
    """Split the observed sites into ordinary ones, one by one, and lists of consecutive sites of one expert."""
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
