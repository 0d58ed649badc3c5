"""The files around the code agree with each other: versions, pins, commands, addresses."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def pins() -> dict[str, str]:
    return {name_of(line): line.split("==")[1] for line in text("constraints.txt").split()}


def test_import_is_light():
    heavy = ["matplotlib", "PIL", "skimage", "pywt", "tqdm", "scipy", "click", "imageio", "safetensors", "IPython"]
    loaded = python(f"import sys, odlkit; print(' '.join(m for m in {heavy} if m in sys.modules))")
    before = python(f"import sys, torch, numpy; print(' '.join(m for m in {heavy} if m in sys.modules))")
    assert set(loaded.split()) <= set(before.split())


def test_one_version():
    version = PROJECT["project"]["version"]
    assert python("import odlkit; print(odlkit.__version__)") == version
    assert yaml.safe_load(text("CITATION.cff"))["version"] == version
    assert re.search(rf"^## {re.escape(version)}\b", text("CHANGELOG.md"), re.M)


def test_constraints_pin_everything_by_plain_version():
    found = pins()
    assert found["torch"] == "2.13.0"
    assert all(re.fullmatch(r"[\w.-]+==[\d.]+(\.?(post|rc|a|b)\d+)*", line) for line in text("constraints.txt").split())
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["book"], *extras["test"]]
    assert {name_of(requirement) for requirement in wanted} <= set(found)
    for requirement in wanted:
        if "==" in requirement:
            assert requirement == f"{requirement.split('==')[0]}=={found[name_of(requirement)]}"


def test_environment_agrees_with_the_package():
    """environment.yml leaves all but Python to pip, and pip to the pins and extras that `make install` uses."""
    environment = yaml.safe_load(text("environment.yml"))
    python_line, pip_line, pip_part = environment["dependencies"]
    assert pip_line == "pip"
    lowest = re.fullmatch(r">=3\.(\d+)", PROJECT["project"]["requires-python"])[1]
    assert int(re.fullmatch(r"python=3\.(\d+)", python_line)[1]) >= int(lowest)
    assert "--constraint constraints.txt" in pip_part["pip"]
    (editable,) = [line for line in pip_part["pip"] if line.startswith("--editable")]
    extras = set(re.search(r"\[(.*)\]", editable)[1].split(","))
    assert extras == set(PROJECT["project"]["optional-dependencies"])
    assert editable.split()[1] in text("Makefile").replace("'", "")


def test_readme_names_the_two_commands_first():
    first = re.search(r"```\w*\n(.*?)```", text("README.md"), re.S)[1]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make book", "make test"]


def test_readme_example_restores(tmp_path):
    """The lines of Python in the README run as they are, and the image ends nearer to the truth than it began."""
    lines = re.search(r"```python\n(.*?)```", text("README.md"), re.S)[1]
    check = "print(float(result.trace['error'][-1]) / float(result.trace.start['error']))"
    command = {"args": [sys.executable, "-c", lines + check], "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run(**command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert float(done.stdout) < 0.5
    assert (tmp_path / "trace.png").stat().st_size > 1000


def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", text("Makefile"), re.M)[1].split()
    assert {target for target in phony if f"make {target} " not in shown} == set()


def test_files_named_in_the_prose_exist():
    """Paths in the README, the architecture and the guide for contributors are paths of the repository."""
    for page in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        names = re.findall(r"`((?:odlkit|book|tests|tools|benchmarks|\.github)/[\w./-]*)`|\]\(([\w./-]+)\)", text(page))
        missing = {name for pair in names for name in pair if name and not (ROOT / name).exists()}
        assert not missing, f"{page} names {sorted(missing)}"


def test_every_module_is_in_the_reference():
    modules = [path.relative_to(ROOT) for path in (ROOT / "odlkit").rglob("*.py") if path.name != "__init__.py"]
    names = {".".join(path.with_suffix("").parts) for path in modules}
    listed = set(
        re.findall(
            r"automodule:: ([\w.]+)", "".join(text(f"book/{page}.md") for page in ("api", "api-work", "api-pipelines"))
        )
    )
    assert {name for name in names if not name.rsplit(".", 1)[-1].startswith("_")} <= listed


def test_the_address_is_one_setting():
    address = yaml.safe_load(text("_config.yml"))["repository"]["url"]
    others = [p for p in tracked() if p.suffix in {".md", ".cff", ".toml", ".yml"} and p.name != "_config.yml"]
    assert [p.name for p in others if address in p.read_text(encoding="utf-8")] == []


def test_no_absolute_paths():
    """Nothing in the repository, stored outputs included, speaks of one machine's folders."""
    pattern = re.compile(r"(?<![\w.:/~>*-])/(?:work|home|root|Users|tmp|opt|farm)/[\w.-]")
    kinds = {".py", ".md", ".toml", ".yml", ".yaml", ".json", ".ipynb", ".txt", ".cff", ".sh", ""}
    texts = {p.name: p.read_text(encoding="utf-8", errors="ignore") for p in tracked() if p.suffix in kinds}
    found = [name for name, content in texts.items() if pattern.search(content)]
    assert found == []
    assert pattern.search("see /" + "home/me")


def test_modules_load_when_they_are_named():
    """``import odlkit as odl`` is enough to reach every module, and costs nothing before."""
    code = """
import sys, odlkit as odl
assert "torch" not in sys.modules
assert odl.operators.Blur
for name in odl.MODULES:
    assert getattr(odl, name).__name__ == f"odlkit.{name}"
try:
    odl.nonsense
except AttributeError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nonsense" in run.stdout
