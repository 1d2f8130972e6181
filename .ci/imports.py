"""Check what import-linter cannot: nothing imports the facade, and no modules import in a circle.

The compiled module ``ptqkit._core`` is not in the graph: an import of it counts as one of
``ptqkit``, which is told apart here by its line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import grimp

FACADE = "ptqkit"
CORE = "import ptqkit._core as _core"


def facade_imports(graph: grimp.ImportGraph) -> Iterator[str]:
    """Yield the lines inside the package that import the facade."""
    for importer in sorted(graph.find_modules_that_directly_import(FACADE)):
        for found in graph.get_import_details(importer=importer, imported=FACADE):
            if found["line_contents"].split("#")[0].strip() != CORE:
                yield f"{importer}:{found['line_number']}: {found['line_contents'].strip()}"


def circles(graph: grimp.ImportGraph) -> Iterator[list[str]]:
    """Yield the modules of each circle (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    open_: list[str] = []

    def visit(module: str) -> Iterator[list[str]]:
        index[module] = low[module] = len(index)
        open_.append(module)
        for other in sorted(graph.find_modules_directly_imported_by(module) - {FACADE}):
            if other not in index:
                yield from visit(other)
                low[module] = min(low[module], low[other])
            elif other in open_:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            circle = open_[open_.index(module) :]
            del open_[-len(circle) :]
            if len(circle) > 1:
                yield sorted(circle)

    for module in sorted(graph.modules):
        if module not in index:
            yield from visit(module)


def main() -> int:
    graph = grimp.build_graph(FACADE)
    problems = [f"imports the facade: {line}" for line in facade_imports(graph)]
    problems += [f"circle: {', '.join(circle)}" for circle in circles(graph)]
    print("\n".join(problems) or f"{len(graph.modules)} modules, no circle")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
