"""The page ``docs/conformance.md``, written by ``python tests/conformance/page.py``."""

import sys
from importlib import import_module
from pathlib import Path

FOLDER = Path(__file__).parent
if __name__ == "__main__":
    sys.path.append(str(FOLDER.parent))

from matrix import CHECKS, COVERS, FAMILIES, LEFT_OUT, MODELS, TIMM, Cover  # noqa: E402

PAGE = FOLDER.parent.parent / "docs" / "conformance.md"


def table() -> str:
    """Return the page, for which all tests are imported to say what they cover."""
    for path in sorted(FOLDER.glob("test_*.py")):
        import_module(path.stem)
    lines = [
        "# Conformance",
        "",
        "What a converted model must still do, and where `tests/conformance/` holds it to that;",
        "what is marked slow runs with `make test-slow`. Written by",
        "`python tests/conformance/page.py`; do not edit. The models are tiny and random:",
        "",
        f"- transformers: {', '.join(FAMILIES)};",
        f"- timm: {', '.join(name.removeprefix('timm ') for name in TIMM)}.",
        "",
        "| check | what | models | test |",
        "|---|---|---|---|",
    ]
    for check, what in CHECKS.items():
        out = LEFT_OUT.get(check, {})
        count = f"{len(MODELS) - len(out)} of {len(MODELS)}" if out else "all"
        tests = "; ".join(_link(cover) for cover in COVERS[check])
        lines.append(f"| {check} | {what} | {count} | {tests} |")
    lines += ["", "Where a check does not apply:", ""]
    for check, out in LEFT_OUT.items():
        for reason in dict.fromkeys(out.values()):
            names = ", ".join(name for name, why in out.items() if why == reason)
            lines.append(f"- {check}: {names}: {reason}.")
    return "\n".join(lines) + "\n"


def _link(cover: Cover) -> str:
    fast = [name for name in cover.models if name not in cover.slow]
    slow = "" if len(fast) == len(cover.models) else " (slow)"
    if slow and fast:
        slow = f" (slow but for {', '.join(fast)})"
    return f"`{cover.test}`{slow}"


if __name__ == "__main__":
    PAGE.write_text(table())
