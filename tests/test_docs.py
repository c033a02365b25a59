"""What README.md and docs say is so: their Python runs, their commands exist, their tables are the committed ones."""

import fnmatch
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cxv
import cxv_kernels
from cxv import cli

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import docs_tables  # noqa: E402

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
# besides cxv and pip
PROGRAMS = ". auditwheel cd g++ git pre-commit pytest python python3 sphinx-build torchrun"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[str]:
    fences = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block for language, block in fences if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the page's blocks of sh, and of those of ours in its sentences."""
    lines = "\n".join(blocks(page, "sh", "")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:cxv |python (?:benchmarks|tools|examples)/)[^`\n]+)`", page.read_text())
    found = []
    for line in lines:
        words = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        words.whitespace_split = True
        found.append([])
        for word in words if "$(" not in line else ():
            if word in ("&&", ";"):
                found.append([])
            elif found[-1] or not re.fullmatch(r"[A-Za-z_]+=.*", word):
                found[-1].append(word)
    return [command for command in found if command]


def help_of(main, argv: list[str], capsys, monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", ["program", *argv, "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    return capsys.readouterr().out


# --- what runs ---


@each_page
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for block in blocks(page, "python"):
        if "in loader" not in block:
            exec(compile(block, str(page), "exec"), names)


def test_readme_training_loop_runs(monkeypatch):
    (block,) = (block for block in blocks(ROOT / "README.md", "python") if "in loader" in block)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 2
    scores = iter([50.0] * 1 + [0.0] * 60)
    model = cxv.CLTV(embed_dim=16, num_heads=2, depth=1, num_classes=2)
    evaluate, batches = cxv.training.evaluate, [(images, labels)]
    monkeypatch.setattr(cxv.training, "evaluate", lambda *a: (evaluate(*a)[0], next(scores)))
    names = {"cxv": cxv, "torch": torch, "model": model, "loader": batches, "validation_loader": batches}
    exec(block, names)
    assert names["opt"].finished
    assert names["opt"].epoch == 41  # one best, 20 stale with AdamW, 20 stale with SGD
    with pytest.raises(RuntimeError):
        names["opt"].end_epoch(1.0)


@each_page
def test_commands_exist_with_their_flags(page, run_script, capsys, monkeypatch):
    pyproject = (ROOT / "pyproject.toml").read_text()
    for words in commands(page):
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        if words[0] == "cxv":
            known = help_of(
                cli.main, words[1:2] if len(words) > 1 and words[1] != "--help" else [], capsys, monkeypatch
            )
        elif words[:2] == ["python", "-m"]:
            assert words[2] in ("cxv_kernels", "cxv", "build"), words
            continue
        elif words[0] == "python" and words[1].startswith(("benchmarks/", "tools/", "examples/")):
            assert (ROOT / words[1]).is_file(), words
            known = run_script(words[1], "--help") if flags else ""
        elif words[0] == "pip":
            for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
                assert all(f"\n{name} = [" in pyproject for name in extra.split(",")), words
            continue
        else:
            assert words[0] in PROGRAMS.split() or words[0].startswith("./") or (ROOT / words[0]).is_file(), words
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), words
            continue
        for flag in flags:
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", known), (flag, words)


def test_quick_start_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mine = [words[1:] for words in commands(ROOT / "docs" / "quick_start.md") if words[0] == "cxv" and len(words) > 1]
    assert [argv[0] for argv in mine] == ["models", "train", "eval", "train"]
    for argv in mine:
        assert cli.main(argv) == 0, argv
    assert "top-1" in capsys.readouterr().out
    assert (tmp_path / "runs" / "quick_start" / "summary.json").is_file()


# --- what is written ---


@each_page
def test_tables_match_the_csv_files(page):
    """`python tools/docs_tables.py` redraws them."""
    text = page.read_text()
    assert text == docs_tables.redrawn(text)


def test_tables_between_marks():
    assert (
        docs_tables.redrawn("a\n<!-- model_step headline -->\nold\n<!-- /model_step headline -->\nb").count("cpv-5/4")
        == 2
    )
    assert docs_tables.redrawn("<!-- another -->\n<!-- /another -->") == "<!-- another -->\n<!-- /another -->"
    with pytest.raises(ValueError, match="has no end"):
        docs_tables.redrawn("<!-- model_step -->\n")


def test_every_table_is_on_a_page():
    text = "".join(page.read_text() for page in PAGES)
    assert [name for name in docs_tables.TABLES if f"<!-- {name} -->" not in text] == []


def test_property_table_names_tests_that_exist():
    """CONTRIBUTING's table of the ops' properties; … and <op> stand for any words."""
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("| property | test |")[2].partition("\n\n")[0]
    texts = {path.name: path.read_text() for path in (ROOT / "tests" / "ops").glob("test_*.py")}
    tests = [f"{file}::{name}" for file, text in texts.items() for name in re.findall(r"(?m)^def (test_\w+)", text)]
    rows = table.splitlines()[2:]
    assert [row for row in rows if "`test_" not in row] == []
    for cell in re.findall(r"`(test_[^`]+)`", "".join(rows)):
        name = cell if "::" in cell else f"{cell}::*" if cell.endswith(".py") else f"*::{cell}"
        assert fnmatch.filter(tests, re.sub("…|<op>", "*", name)), cell


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_of_files_exist(name):
    """Those of files that are read outside the site; the strict build checks the others."""
    page = ROOT / name
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], target


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


# --- the site and the notebook ---


def test_site_builds_without_warnings(tmp_path):
    site = tmp_path / "site"
    strict = ["-W", "--keep-going", "-q", "-d", tmp_path / "doctrees"]
    build = [sys.executable, "-m", "sphinx", *strict, ROOT / "docs", site]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    assert {path.stem for path in pages} >= {page.stem for page in (ROOT / "docs").rglob("*.md")} | {"quickstart"}
    remote = re.compile(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=\"(?:https?:)?//")
    assert [path.name for path, text in pages.items() if remote.search(text)] == []  # it can be read offline
    assert 'href="performer_attention.html"' in pages[site / "ops" / "linear_attention.html"]
    for module in (cxv, cxv_kernels):
        api = pages[site / "api" / f"{module.__name__}.html"]
        public = [name for name in module.__all__ if callable(getattr(module, name))]
        assert [name for name in public if f'id="{module.__name__}.{name}"' not in api] == []


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    import nbclient  # not in every process that collects tests
    import nbformat

    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert float(re.search(r"best weights: top-1 ([\d.]+) %", text)[1]) > 80
    reference, fused = (float(number) for number in re.findall(r"([\d.]+) MB kept", text))
    assert fused < reference / 5
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
