"""What `import ecomoe` loads, and which module may import which."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ["transformers", "timm", "rich", "plotly", "matplotlib", "scipy", "pandas"]

# From the bottom up: a module imports only from rows above its own in this list. A new module is
# entered here. `ecomoe` is the package itself: its public names are for adapters and programs.
LAYERS = [
    {"arguments", "activations", "buffers", "machines", "model_config", "tensor_arguments"},
    {"control", "cost_model", "hooks", "pieces", "routing", "token_ids"},
    {"calibration", "device_cost"},
    {"costing"},
    {"losses", "dispatch", "grouped"},
    {"closed_form", "few_slots"},
    {"feed_forward"},
    {"routers.base"},
    {"routers.affine", "routers.cosine", "routers.hashed"},
    {"routers", "experts"},
    {"auxiliary", "oracle"},
    {"objective"},
    {"moe", "relay", "terms"},
    {"cost", "experts_implementation"},
    {"distributed"},
    {"upcycle", "multihop"},
    {"sites"},
    {"summary"},
    {"convert", "schedule"},
    {"loading"},
    {"ecology"},
    {"ecology.alignment", "ecology.statistics", "ecology.outcomes"},
    {"ecology.taxonomy", "ecology.tiers", "ecology.lockdown", "ecology.redundancy"},
    {"ecology.saturation", "ecology.traffic"},
    {"ecology.events", "ecology.compare", "ecology.taps"},
    {"ecology.records", "ecology.seeds", "ecology.sinks", "ecology.decode", "ecology.transfer"},
    {"ecology.report", "ecology.readers"},
    {"ecology.console", "ecology.html", "ecology.recorder"},
    {"ecology.layer_state"},
    {"ecology.watch", "ecology.live"},
    {"ecology.callback"},
    {"ecology.monitor"},
    {"rescue"},
    {"ecomoe"},
    {
        "integrations",
        "integrations.huggingface_blocks",
        "integrations.coverage",
        "integrations.tiny",
    },
    {
        "integrations.huggingface",
        "integrations.timm",
        "integrations.timm_training",
        "integrations.trainer",
    },
    {"integrations.census"},
    {"cli"},
    {"__main__"},
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}

# Beyond the standard library, what a module may need at import time, by its first name.
THIRD_PARTY = {
    "arguments": set(),
    "control": set(),
    "cost_model": set(),
    "device_cost": set(),
    "machines": set(),
    "ecology": {"torch", "rich", "plotly", "scipy"},
    "integrations": {"torch", "transformers", "timm"},
}


class Import(NamedTuple):
    module: str
    names: tuple[str, ...]
    in_function: bool
    for_types: bool


def _imports(node: ast.AST, in_function: bool = False, for_types: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, (), in_function, for_types)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute, so that this test can read them"
            names = tuple(alias.name for alias in child.names)
            yield Import(child.module or "", names, in_function, for_types)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for statement in child.body:
                yield from _imports(ast.Module([statement], []), in_function, True)
            for statement in child.orelse:
                yield from _imports(ast.Module([statement], []), in_function, for_types)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, in_function or function, for_types)


def _modules() -> dict[str, Path]:
    """Map a module's name without the leading `ecomoe.` to its file."""
    modules = {}
    for top, prefix in ((ROOT / "ecomoe", ()), (ROOT / "integrations", ("integrations",))):
        for path in top.rglob("*.py"):
            parts = path.relative_to(top).with_suffix("").parts
            if top.name == "ecomoe" and parts[0] == "integrations":
                continue  # the symlink
            parts = prefix + (parts[:-1] if parts[-1] == "__init__" else parts)
            modules[".".join(parts) or "ecomoe"] = path
    return modules


MODULES = _modules()


def _targets(found: Import) -> set[str]:
    """Name the project's modules that an import refers to; empty for another project's."""
    if found.module.split(".")[0] != "ecomoe":
        return set()
    base = found.module.removeprefix("ecomoe").removeprefix(".")
    targets = set()
    for name in found.names or ("",):
        # `from ecomoe import x` is a submodule only if x is not also a public name.
        submodule = f"{base}.{name}" if base else name
        public = not base and name in importlib.import_module("ecomoe").__all__
        targets.add(submodule if submodule in MODULES and not public else base or "ecomoe")
    return targets


def _read(source: str) -> list[Import]:
    return list(_imports(ast.parse(source)))


@pytest.mark.parametrize("module", MODULES)
def test_module_is_entered_in_the_table(module):
    assert module in RANK, f"enter {module} in LAYERS, in the row it belongs to"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    up = {
        target
        for found in _read(MODULES[module].read_text())
        if not found.in_function
        for target in _targets(found)
        if RANK[target] >= RANK[module]
    }
    assert not up, f"{module} must import only from layers below it, and imports {sorted(up)}"


@pytest.mark.parametrize("module", [m for m in MODULES if RANK.get(m, 0) < RANK["ecology"]])
def test_layer_never_imports_ecology(module):
    for found in _read(MODULES[module].read_text()):
        assert not any(target.startswith("ecology") for target in _targets(found))


@pytest.mark.parametrize("module", MODULES)
def test_third_party_at_import_time(module):
    allowed = THIRD_PARTY.get(module.split(".")[0], {"torch"})
    loaded = {
        found.module.split(".")[0]
        for found in _read(MODULES[module].read_text())
        if not found.in_function and not found.for_types
    }
    extra = loaded - sys.stdlib_module_names - {"ecomoe"} - allowed
    assert not extra, f"{module} must import {sorted(extra)} inside the function that needs it"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("integrations.")])
def test_adapters_use_public_names(module):
    for found in _read(MODULES[module].read_text()):
        if _targets(found):
            private = [n for n in (*found.module.split("."), *found.names) if n.startswith("_")]
            assert not private


def test_reader_sees_where_an_import_stands():
    found = _read(
        "import a.b\n"
        "if TYPE_CHECKING:\n    from c import d\nelse:\n    import e\n"
        "try:\n    import f\nexcept ImportError:\n    pass\n"
        "class C:\n    import g\n    def m(self):\n        from h import i\n"
    )
    assert found == [
        Import("a.b", (), False, False),
        Import("c", ("d",), False, True),
        Import("e", (), False, False),
        Import("f", (), False, False),
        Import("g", (), False, False),
        Import("h", ("i",), True, False),
    ]


def _run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_torch_alone():
    program = f"import sys, ecomoe; print(sorted(sys.modules.keys() & {set(HEAVY)!r}))"
    assert _run(program) == "[]"


def test_public_names_resolve():
    program = (
        "import ecomoe\n"
        "for name in ecomoe.__all__: assert getattr(ecomoe, name).__name__ == name, name\n"
        "assert set(ecomoe.__all__) <= set(dir(ecomoe))\n"
        "print(ecomoe.__version__)"
    )
    assert _run(program).count(".") == 2


def test_unknown_name_is_an_attribute_error():
    ecomoe = importlib.import_module("ecomoe")
    with pytest.raises(AttributeError, match="'ecomoe' has no attribute 'nothing'"):
        _ = ecomoe.nothing


@pytest.mark.skipif("convert" not in MODULES, reason="ecomoe.convert is not there yet")
@pytest.mark.parametrize(
    "first",
    [
        "import ecomoe",
        "import ecomoe.convert",
        "from ecomoe.convert import convert",
        "import importlib; importlib.import_module('ecomoe.convert')",
        "import ecomoe; import ecomoe.convert",
    ],
)
def test_convert_stays_a_function(first):
    """The module of the same name would take its place if it were first imported later."""
    program = f"{first}\nimport ecomoe, ecomoe.convert\nprint(type(ecomoe.convert).__name__)"
    assert _run(program) == "function"
