"The page 17_trust names the test of each promise, and these tests exist."
import ast, re
from pathlib import Path
import nbformat

top = Path(__file__).resolve().parent.parent
page = "\n".join(c.source for c in nbformat.read(top/"nbs/17_trust.ipynb", 4).cells)


def test_each_named_test_exists():
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", page)
    assert len(named) > 25
    for file, name in named:
        tree = ast.parse((top/"tests"/file).read_text(encoding="utf-8"))
        assert not name or name in {o.name for o in tree.body if isinstance(o, ast.FunctionDef)}, (file, name)


def test_every_promise_of_a_table_names_its_test():
    rows = [o for o in page.splitlines() if o.startswith("| ") and not o.startswith(("| promise", "|---"))]
    assert len(rows) > 25
    for o in rows: assert re.search(r"`test_\w+\.py", o), o


def test_every_trust_file_is_named():
    for p in (top/"tests").glob("test_trust_*.py"):
        assert p.name in page or p.name == Path(__file__).name, p.name
