"""Where this course lives: one address in pyproject.toml, and everything that repeats it, stamped by one command.

    python -m helpers stamp https://github.com/you/moe-course [--ref v1.0]

Badges and set-up cells cannot look an address up: a notebook opened in Colab is alone. So they hold copies, and a test
compares them with the one place.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from helpers.files import write_text
from helpers.profiles import ROOT

HOST = "https://github.com/"
PLACE = "pyproject.toml"
# slug: owner/name; ref: a branch or tag
COPIES = {
    "notebooks/*.ipynb": (
        r"https://colab\.research\.google\.com/github/(?P<slug>[\w.-]+/[\w.-]+)/blob/(?P<ref>[\w./-]+?)/notebooks/",
        r"REPO, REF = \\\"(?P<url>https://[^\\\"]+)\\\", \\\"(?P<ref>[^\\\"]+)\\\"",
    ),
    "CITATION.cff": (r"repository-code: \"(?P<url>https://[^\"]+)\"",),
    PLACE: (r"Repository = \"(?P<url>https://[^\"]+)\"", r"# branch or tag that the badges open: (?P<ref>\S+)"),
}


def address(root: Path = ROOT) -> tuple[str, str]:
    """(URL of the repository, branch or tag that the badges name)."""
    text = (root / PLACE).read_text(encoding="utf-8")
    ref = re.search(COPIES[PLACE][1], text)
    return tomllib.loads(text)["project"]["urls"]["Repository"], ref["ref"] if ref else "main"


def parse(url: str) -> str:
    """https://github.com/owner/name, without slash or .git at its end; ValueError for anything else."""
    match = re.fullmatch(r"(?:https://|git@)github\.com[/:]([\w.-]+)/([\w.-]+?)(?:\.git)?/?", url.strip())
    if not match:
        raise ValueError(f"{url!r} is not a repository on GitHub: write https://github.com/owner/name (Colab opens no others)")
    return f"{HOST}{match[1]}/{match[2]}"


def stamp_text(text: str, pattern: str, url: str, ref: str) -> tuple[str, int]:
    """(the text with the named groups of each match exchanged, number of matches)."""
    values = {"url": url, "slug": url.removeprefix(HOST), "ref": ref}

    def exchange(match: re.Match[str]) -> str:
        whole = match[0]
        for name in sorted(match.groupdict(), key=match.start, reverse=True):  # from the end, so that places stay right
            begin, end = (at - match.start() for at in match.span(name))
            whole = whole[:begin] + values[name] + whole[end:]
        return whole

    return re.subn(pattern, exchange, text)


def stamp(url: str, ref: str = "main", root: Path = ROOT) -> list[Path]:
    """Write the address into its one place and all copies; returns the files that changed."""
    url, changed = parse(url), []
    if not re.fullmatch(r"\w[\w./-]*", ref):
        raise ValueError(f"{ref!r} is no name of a branch or tag")
    for glob, patterns in COPIES.items():
        for path in sorted(root.glob(glob)):
            old = new = path.read_text(encoding="utf-8")
            for pattern in patterns:
                new, found = stamp_text(new, pattern, url, ref)
                if not found:
                    raise ValueError(f"{path.relative_to(root)} holds no address where one belongs (looked for {pattern})")
            if new != old:
                write_text(path, new)
                changed.append(path)
    return changed
