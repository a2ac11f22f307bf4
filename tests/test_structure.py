"""The structure of the package, from its syntax trees: imports, and sizes of modules and functions."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ssl_runner"

# Sub-package or module -> what it imports of the others. Each line imports only what stands above it.
IMPORTS = """
    errors
    names
    rule
    view_layout     rule
    version
    batch
    backbone        errors names
    projector
    preemption
    background      errors
    host_copy
    timer
    progress
    console         errors
    optimizer       errors
    distributed     errors preemption
    device          distributed errors
    guard           device
    numerics        errors
    config          console errors names rule view_layout
    runs            background config distributed errors host_copy preemption version

    views           batch distributed errors numerics rule view_layout
    relation        batch device distributed errors
    loss            distributed errors names relation
    data            batch device distributed errors names numerics progress runs views
    model           backbone
    evaluator       errors model
    solver          loss model relation

    step_graph      batch device errors
    train           batch data device distributed errors guard loss model numerics preemption progress
                    relation solver step_graph timer views
    theory          backbone batch data device distributed errors evaluator host_copy loss model progress
                    relation runs solver
    probe           backbone batch data device distributed errors evaluator model optimizer progress runs
                    view_layout views

    pretrained      data device errors numerics runs views

    degenerate      backbone batch data distributed errors loss model relation
    checks          backbone config data degenerate distributed errors loss model probe relation solver
                    views
    build           backbone checks config data device distributed errors evaluator loss model names
                    numerics optimizer preemption probe relation runs solver
    profile         data evaluator runs
    compiler        data distributed solver views
    embedding_map   data distributed errors probe runs
    facts           build data distributed errors model probe runs theory views
    loggers         config errors preemption
    pipeline        background build compiler data degenerate device distributed embedding_map errors
                    evaluator facts loggers numerics preemption probe profile progress runs solver theory
    evaluation      build checks config console data device errors model names numerics pretrained probe
                    progress relation runs theory views
    cli             build config console distributed errors pipeline preemption runs version
    __main__        cli
    api             cli config errors runs
    report          config console data errors runs
"""

MAX_LINES, LONGER = 300, {"views.cpu_kernels", "theory.eigenspaces"}  # numerical modules
MAX_PARAMETERS = 11  # besides self
SLOW_IMPORTS = {"numba", "numpy", "pandas", "scipy", "sklearn", "timm", "torch", "torchvision"}


@cache
def modules() -> dict[str, ast.Module]:
    """Syntax trees by dotted name within the package; a sub-package's __init__ has the sub-package's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found[name] = ast.parse(path.read_text())
    return found


def statements(tree: ast.AST, within_functions: bool) -> Iterator[ast.AST]:
    """All nodes of a tree, without the bodies of functions unless `within_functions`."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if within_functions or not isinstance(node, ast.FunctionDef):
            yield from statements(node, within_functions)


def imported(module: str, within_functions: bool = True) -> set[str]:
    """Names that a module imports: dotted names, `package.member` for `from package import member`."""
    names = set()
    for node in statements(modules()[module], within_functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(module: str, within_functions: bool = True) -> set[str]:
    """Modules of this package that a module imports."""
    found = set()
    for name in imported(module, within_functions):
        if name.startswith("ssl_runner."):
            inner = name.removeprefix("ssl_runner.")
            found.add(inner if inner in modules() else inner.rpartition(".")[0])
    return found - {""}  # the package itself holds only its version


def expected_imports() -> dict[str, set[str]]:
    """The table as sets. A deeper line continues the one above it."""
    table: dict[str, set[str]] = {}
    for line in filter(str.strip, IMPORTS.splitlines()):
        if line[4] != " ":
            name = line.split()[0]
            table[name] = set(line.split()[1:])
        else:
            table[name] |= set(line.split())
    return table


def test_imports_are_those_of_the_table() -> None:
    actual: dict[str, set[str]] = {}
    for module in filter(None, modules()):
        part = module.partition(".")[0]
        others = {other.partition(".")[0] for other in imported_modules(module)} - {part}
        actual[part] = actual.get(part, set()) | others
    assert actual == expected_imports()


def test_table_of_imports_is_ordered_from_bottom_to_top() -> None:
    above: set[str] = set()
    for name, others in expected_imports().items():
        assert others <= above, f"{name} imports {others - above}, which stands below it"
        above.add(name)


def test_modules_have_no_import_cycle() -> None:
    TopologicalSorter({module: imported_modules(module) for module in modules()}).prepare()


def test_command_line_imports_no_slow_library_before_a_job_runs() -> None:
    closure, waiting = set(), ["cli", *(f"evaluation.{name}_cli" for name in ("probe", "embed", "relation"))]
    while waiting:
        module = waiting.pop()
        if module not in closure:
            closure.add(module)
            waiting += imported_modules(module, within_functions=False)
            waiting += [module.rpartition(".")[0]]  # importing a module runs its package's __init__
    libraries = {
        (module, name.partition(".")[0])
        for module in closure
        for name in imported(module, within_functions=False)
    }
    assert {(module, library) for module, library in libraries if library in SLOW_IMPORTS} == set()


def test_device_alone_copies_asynchronously() -> None:
    """Asynchronous copies and pinned memory are safe on CUDA only. These modules check for it."""
    users = {
        module
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.keyword) and node.arg in ("non_blocking", "pin_memory"))
        or (isinstance(node, ast.Attribute) and node.attr == "pin_memory")
    }
    assert users == {"data.images", "device", "host_copy"}


def test_modules_are_short() -> None:
    lengths = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): len(path.read_text().splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {name: n for name, n in lengths.items() if n > MAX_LINES and name not in LONGER} == {}
    assert all(lengths[name] > MAX_LINES for name in LONGER)


def test_functions_take_few_parameters() -> None:
    long = {}
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls", "ctx")]
                if len(names) > MAX_PARAMETERS:
                    long[f"{module}.{node.name}"] = len(names)
    assert long == {}
