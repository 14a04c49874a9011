"""The house in figures: size, signatures, imports, names and checks, counted over the package and its pages.

python tests/house_figures.py [--json FILE] [--list WHAT]

Nothing of reidlab is imported to count; everything is read with ast. Only the last two figures start Python.
"""

import argparse
import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "reidlab"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
CHECKS = re.compile(
    r"assert\w*|assert_\w+|test_(eq|close|ne|is|sig|shuffled|stdout|warns|fail|eq_type)|expect_fail|raises|fails"
)


# --- what is read ----------------------------------------------------------------------------


@cache
def modules():
    "Every exported module: name without the package's → (text, tree)."
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.stem not in ("__init__", "_modidx"):
            text = path.read_text(encoding="utf-8")
            found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = text, ast.parse(text)
    return found


def is_public(name):
    return not name.startswith("_")


@cache
def functions():
    "(module, name in it, node, text's lines) of every function: methods as Class.method, inner ones left out."
    found = []
    for module, (text, tree) in modules().items():
        for node in tree.body:
            if isinstance(node, FUNCTIONS):
                found.append((module, node.name, node, text))
            elif isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, FUNCTIONS):
                        found.append((module, f"{node.name}.{inner.name}", inner, text))
    return found


def public_functions(methods=True):
    "Functions without an underscore; a public class's __init__ and methods count, other dunders do not."
    for module, name, node, text in functions():
        parts = name.split(".")
        counted = is_public(parts[0]) and (is_public(parts[-1]) or parts[-1] == "__init__")
        if counted and (methods or len(parts) == 1):
            yield module, name, node, text


def parameters(node):
    "A function's parameters, without self and cls."
    a = node.args
    named = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs]
    named += [a.kwarg] if a.kwarg else []
    return [p for p in named if p.arg not in ("self", "cls")]


@cache
def comments(text):
    "Line → whether a comment stands alone on it."
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.line.lstrip().startswith("#")
    return found


def documented(node, text):
    """Names of parameters with a comment on their line, or alone on the line above.

    A comment belongs to the last of its line, which may be what the function returns.
    """
    seen, last = comments(text), {}
    for p in parameters(node):
        last[p.end_lineno] = p.arg
    if node.returns is not None:
        last[node.returns.lineno] = ""
    for line, name in last.items():
        if name and (line in seen or seen.get(line - 1)):
            yield name


# --- pages -----------------------------------------------------------------------------------


def plain(source):
    "A cell's syntax tree without the lines that only IPython reads; None where that is no Python."
    lines = [x for x in source.splitlines() if not re.match(r"\s*[%!]", x)]
    try:
        return ast.parse("\n".join(lines))
    except SyntaxError:
        return None


@cache
def notebooks():
    "Every notebook: path → [(kind, source)]."
    found = {}
    for folder in ("nbs", "data_prep", "reports"):
        for path in sorted((ROOT / folder).rglob("*.ipynb")):
            if not any(p.startswith((".", "_")) for p in path.relative_to(ROOT).parts):
                cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
                found[path] = [(c["cell_type"], "".join(c["source"])) for c in cells]
    return found


def is_export(source):
    return bool(re.match(r"#\|\s*exporti?\b", source))


def module_of(path):
    "The module a chapter becomes, or None."
    for _, source in notebooks()[path]:
        if found := re.match(r"#\|\s*default_exp\s+(\S+)", source):
            return found[1]
    return None


@cache
def consumers():
    """Everything that may use a name: (kind, module or None, trees).

    A module itself, its chapter's example cells, other pages, tests, benchmarks.
    """
    found = [("package", m, [tree]) for m, (_, tree) in modules().items()]
    for path, cells in notebooks().items():
        code = [plain(s) for kind, s in cells if kind == "code" and not is_export(s)]
        module = module_of(path)
        kind = "chapters" if module else "pages"
        found.append((kind, module, [tree for tree in code if tree]))
    for folder in ("tests", "benchmarks", "recipes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path != Path(__file__):
                kind = "tests" if folder == "tests" else "pages"
                found.append((kind, None, [ast.parse(path.read_text(encoding="utf-8"))]))
    return found


def absolute(node, module):
    "The module an import-from names, without the package's; None where it is somebody else's."
    if node.level:
        base = module.split(".")[: -node.level]
        return ".".join([*base, *filter(None, [node.module])])
    if node.module == "reidlab":
        return ""
    return node.module.removeprefix("reidlab.") if node.module.startswith("reidlab.") else None


def bound(trees, module):
    "Local name → (module, name of it or None for the module itself), and the star imports."
    names, stars = {}, []
    for node in (n for tree in trees for n in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom):
            where = absolute(node, module or "")
            for alias in node.names if where is not None else ():
                if alias.name == "*":
                    stars.append(where)
                    continue
                inner = f"{where}.{alias.name}".strip(".")
                target = (inner, None) if inner in modules() else (where, alias.name)
                names[alias.asname or alias.name] = target
        elif isinstance(node, ast.Import):
            for alias in node.names:
                inner = alias.name.removeprefix("reidlab.")
                if alias.asname and inner in modules():
                    names[alias.asname] = (inner, None)
    return names, stars


def dotted(node):
    "a.b.c as text, or None."
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        front = dotted(node.value)
        return front and f"{front}.{node.attr}"
    return None


def target(node, names, own):
    "The (module, name) of ours that an expression names, or None."
    text = dotted(node)
    if text is None:
        return None
    front, _, rest = text.partition(".")
    if front in names:
        module, name = names[front]
        if name:
            return (module, name) if not rest else None
        return (module, rest) if rest and "." not in rest else None
    if text.startswith("reidlab."):
        module, _, name = text.removeprefix("reidlab.").rpartition(".")
        return (module, name) if module in modules() else None
    return (own, text) if own and text in defined(own) else None


@cache
def defined(module):
    "A module's own functions and classes by name."
    kinds = (*FUNCTIONS, ast.ClassDef)
    return {n.name: n for n in modules()[module][1].body if isinstance(n, kinds)}


@cache
def uses():
    "(module, name) → the set of what uses it: package, chapters, pages, tests, 'own chapter'."
    found = defaultdict(set)
    for kind, own, trees in consumers():
        names, _ = bound(trees, own)
        for name in names.values():
            if name[1]:
                found[name].add(kind if name[0] != own else "own chapter")
        for top in (n for tree in trees for n in tree.body):
            for node in ast.walk(top):
                if isinstance(node, ast.Name | ast.Attribute):
                    hit = target(node, names, own)
                    if hit and getattr(top, "name", None) != hit[1]:
                        inside = kind == "chapters" and hit[0] == own
                        found[hit].add("own chapter" if inside else kind)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    for where, name in re.findall(r"reidlab\.([\w.]+):(\w+)", node.value):
                        found[where, name].add(kind)
    return found


# --- the figures -----------------------------------------------------------------------------


def length(node):
    "Lines from def to the end, the signature's further lines and the docstring left out."
    body = node.body
    if ast.get_docstring(node) is not None:
        body = body[1:]
    return 1 + (body[-1].end_lineno - body[0].lineno + 1 if body else 0)


def lines():
    "Lines of all functions and methods, private ones too."
    sizes = [length(node) for _, _, node, _ in functions()]
    whole = [node.end_lineno - node.lineno + 1 for _, _, node, _ in functions()]
    cut = quantiles(sizes, n=10)
    long = sorted(((length(n), f"{m}:{name}") for m, name, n, _ in functions()), reverse=True)
    return {
        "functions and methods": len(sizes),
        "function lines, median": median(sizes),
        "function lines, 90th percentile": cut[-1],
        "with signature and docstring, median": median(whole),
        "with signature and docstring, 90th percentile": quantiles(whole, n=10)[-1],
    }, {"long functions": [f"{n} {name}" for n, name in long if n > 22]}


def signatures():
    "Parameters, types and docments of what is public."
    many, untyped, bare = [], [], []
    n_functions = n_parameters = 0
    for module, name, node, text in public_functions():
        given, said = parameters(node), set(documented(node, text))
        n_functions, n_parameters = n_functions + 1, n_parameters + len(given)
        if len(given) > 8:
            many.append(f"{len(given)} {module}:{name}")
        open_ = [p.arg for p in given if p.annotation is None]
        if node.returns is None and node.name != "__init__":
            open_.append("→")
        if open_:
            untyped.append(f"{module}:{name} {' '.join(open_)}")
        bare += [f"{module}:{name} {p.arg}" for p in given if p.arg not in said]
    return {
        "public functions and methods": n_functions,
        "… with more than 8 parameters": len(many),
        "… fully typed, %": round(100 * (1 - len(untyped) / n_functions), 1),
        "parameters of them": n_parameters,
        "… with a docment, %": round(100 * (1 - len(bare) / n_parameters), 1),
    }, {"many parameters": many, "untyped": untyped, "no docment": bare}


def exported_lines(path):
    "Lines of a chapter's exported cells that are not empty."
    code = [s for kind, s in notebooks()[path] if kind == "code" and is_export(s)]
    return sum(bool(x.strip()) and not x.startswith("#|") for s in code for x in s.splitlines())


def described(path):
    "Whether a title, a line that says what it is and 20 words or more stand before the first exported definition."
    words = []
    for kind, source in notebooks()[path]:
        if kind == "markdown":
            words.append(source)
        elif is_export(source) and re.search(r"^(def|class|@|[A-Z_]+ =)", source, re.MULTILINE):
            break
    opening = "\n".join(words)
    front = re.match(r"# .+\n\n> .+", opening)
    return bool(front) and len(opening[front.end() :].split()) >= 20


def chapters():
    "Size and opening of every chapter."
    pages = [p for p in notebooks() if module_of(p)]
    sizes = {module_of(p): exported_lines(p) for p in pages}
    long = sorted(((n, m) for m, n in sizes.items() if n > 150), reverse=True)
    silent = [module_of(p) for p in pages if not described(p)]
    return {
        "chapters": len(pages),
        "… over 150 exported lines": len(long),
        "… that open without a description": len(silent),
    }, {"long chapters": [f"{n} {m}" for n, m in long], "silent chapters": silent}


def circles(graph):
    "The groups of modules that import each other, by what each reaches."
    reach = {m: set(to) for m, to in graph.items()}
    for _ in graph:
        before = sum(map(len, reach.values()))
        reach = {m: to.union(*(reach.get(x, ()) for x in to)) for m, to in reach.items()}
        if sum(map(len, reach.values())) == before:
            break
    groups = {frozenset(x for x in reach[m] if m in reach.get(x, ())) for m in graph}
    return [" ".join(sorted(g)) for g in groups if g]


def imports():
    "Stars, other modules' underscores and circles, imports inside functions counted too."
    stars, private, graph = [], [], {}
    for module, (_, tree) in modules().items():
        names, star = bound([tree], module)
        stars += [f"{module} {x}" for x in star]
        private += [f"{module} {w}:{n}" for w, n in names.values() if n and not is_public(n)]
        for node in ast.walk(tree):
            hit = isinstance(node, ast.Attribute) and target(node, names, None)
            if hit and not is_public(hit[1]) and not hit[1].startswith("__"):
                private.append(f"{module} {hit[0]}:{hit[1]}")
        graph[module] = {w for w, _ in names.values() if w in modules()} - {module}
    rounds = circles(graph)
    found = {"star imports": stars, "private imports": private, "import circles": rounds}
    return {what: len(items) for what, items in found.items()}, found


def usage():
    "Public functions and classes by who uses them."
    nowhere, alone = [], []
    for module in modules():
        for name in filter(is_public, defined(module)):
            seen = uses()[module, name]
            if not seen - {"own chapter"}:
                nowhere.append(f"{module}:{name}{'' if seen else ' (not even there)'}")
            elif not seen - {"own chapter", "tests"}:
                alone.append(f"{module}:{name}")
    return {
        "public names used nowhere but in their own chapter": len(nowhere),
        "public names used in their chapter and tests alone": len(alone),
    }, {"used nowhere": nowhere, "used in tests alone": alone}


def doubles():
    "Names that public functions or classes of two modules share; a patched method is no name of its own."
    places = defaultdict(list)
    for module in modules():
        for name, node in defined(module).items():
            patched = any(
                dotted(d) in ("patch", "fastcore.basics.patch") for d in node.decorator_list
            )
            if is_public(name) and not patched:
                places[name].append(module)
    twice = {n: where for n, where in sorted(places.items()) if len(where) > 1}
    listed = [f"{n}: {', '.join(where)}" for n, where in twice.items()]
    return {"public names with two or more meanings": len(twice)}, {"two meanings": listed}


def takes_names(node):
    "Whether a fourth argument could be named: not of *args, and not of a compiled kernel."
    if isinstance(node, ast.ClassDef):
        return True
    compiled = any("njit" in ast.unparse(d) for d in node.decorator_list)
    return not compiled and len(node.args.args) > 3


def calls():
    "Calls with more than three positional arguments to functions and classes of ours, by where they stand."
    found = defaultdict(list)
    for kind, own, trees in consumers():
        names, _ = bound(trees, own)
        for node in (n for tree in trees for n in ast.walk(tree)):
            if isinstance(node, ast.Call):
                given = [a for a in node.args if not isinstance(a, ast.Starred)]
                hit = len(given) > 3 and target(node.func, names, own)
                known = hit and hit[0] in modules() and defined(hit[0]).get(hit[1])
                if known and takes_names(known):
                    where = f"{own}:{node.lineno}" if kind == "package" else own or "-"
                    found[kind].append(f"{where} {hit[0]}:{hit[1]} {len(given)}")
    return {
        f"calls with more than 3 positional arguments, {kind}": len(found[kind])
        for kind in ("package", "chapters", "pages", "tests")
    }, {f"long calls in {kind}": items for kind, items in found.items()}


def checks(trees):
    "How many things a piece of code asserts: assert, test_eq, expect_fail, assert_close, pytest.raises …"
    n = 0
    for node in (n for tree in trees for n in ast.walk(tree)):
        if isinstance(node, ast.Assert):
            n += 1
        elif isinstance(node, ast.Call) and (name := dotted(node.func)):
            n += bool(CHECKS.fullmatch(name.split(".")[-1]))
    return n


def assertions():
    "Test functions and assertions, in tests/ and in the example cells of the book."
    tests = [tree for kind, _, trees in consumers() if kind == "tests" for tree in trees]
    book = [tree for kind, _, trees in consumers() if kind == "chapters" for tree in trees]
    cells = [node for tree in tests for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    return {
        "test functions in tests/": sum(node.name.startswith("test_") for node in cells),
        "assertions in tests/": checks(tests),
        "assertions in chapters": checks(book),
    }, {}


def loaded(statement, *prefixes):
    "Which of these packages a fresh Python has loaded after a statement."
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return [done.stderr.strip().splitlines()[-1]]
    names = json.loads(done.stdout.splitlines()[-1])
    return [p for p in prefixes if any(n == p or n.startswith(p + ".") for n in names)]


def weight():
    "What a first import brings along."
    heavy = ("torchvision.models", "timm", "reidlab.nas", "reidlab.models", "pandas", "matplotlib")
    home = [m for m in modules() if "rank_features" in defined(m)]
    face = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    where = "reidlab" if "rank_features" in face else f"reidlab.{home[0]}"
    first = loaded("import reidlab", "torch", "numpy")
    ranking = loaded(f"from {where} import rank_features", *heavy)
    return {
        "import reidlab loads": ", ".join(first) or "neither torch nor numpy",
        f"from {where} import rank_features loads": ", ".join(ranking) or "nothing heavy",
    }, {}


GOALS = {
    "function lines, median": "≤ 8",
    "function lines, 90th percentile": "≤ 22",
    "… with more than 8 parameters": "0, or why",
    "… fully typed, %": "100",
    "… with a docment, %": "≥ 95",
    "… over 150 exported lines": "≤ 30",
    "… that open without a description": "0",
    "star imports": "0",
    "private imports": "0",
    "import circles": "0",
    "public names used nowhere but in their own chapter": "0, or why",
    "calls with more than 3 positional arguments, package": "0",
}


def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--json", type=Path, help="also write figures and lists to this file")
    ask.add_argument("--list", help="print one list of items: 'long chapters', 'no docment' …")
    chosen = ask.parse_args()
    figures, lists = {}, {}
    parts = (lines, signatures, chapters, imports, usage, doubles, calls, assertions, weight)
    for part in parts:
        numbers, items = part()
        figures |= numbers
        lists |= items
    if chosen.json:
        both = {"figures": figures, "lists": lists}
        chosen.json.write_text(json.dumps(both, indent=1, ensure_ascii=False), encoding="utf-8")
    if chosen.list:
        if chosen.list not in lists:
            ask.error(f"no list {chosen.list!r}; there are {', '.join(lists)}")
        print("\n".join(lists[chosen.list]), flush=True)
        return
    for what, value in figures.items():
        print(f"{what:<62} {value!s:>9}  {GOALS.get(what, '')}".rstrip())


if __name__ == "__main__":
    main()
