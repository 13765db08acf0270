"""What a release holds: wheel and source archive, each installed into a clean environment of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from importlib import resources
from pathlib import Path

import pytest
import yaml
from fresh_environment import NO_ISOLATION, REPOSITORY, Environment, build_wheel
from packaging.requirements import Requirement
from packaging.version import Version

import nnunet_flare

START_UP = {"nnunet_flare_plugin.pth", "nnunet_flare_plugin.start"}
NEEDED_BY_CONTRIBUTORS = (
    "Makefile",
    "mkdocs.yml",
    "pyproject.toml",
    "tests/conftest.py",
    "docker/Dockerfile",
    ".dockerignore",
    ".github/workflows/tests.yml",
    ".github/ISSUE_TEMPLATE/bug.yml",
)

LOOK = """
from importlib import resources
from nnunet_flare.recipes.load import load_recipe, shipped_recipes
report = resources.files("nnunet_flare.report")
assert (report / "templates" / "index.html.j2").is_file() and (report / "static" / "report.css").is_file()
assert (resources.files("nnunet_flare.recipes") / "pages" / "recipes-uncertainty.md").is_file()
print(len([load_recipe(name) for name in shipped_recipes()]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, built as ``python -m build --sdist`` does."""
    pytest.importorskip("hatchling", reason="the build backend is not installed (pip install hatchling)")
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys; from hatchling.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=REPOSITORY, check=True, capture_output=True)
    (made,) = folder.glob("*.tar.gz")
    return made


def package_files() -> set[str]:
    """Every file of the package in this checkout, but for what Python and editors leave there."""
    package = REPOSITORY / "nnunet_flare"
    return {
        path.relative_to(REPOSITORY).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def test_the_wheel_holds_the_whole_package_and_the_start_up_files(wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    pages = {f"nnunet_flare/recipes/pages/{path.name}" for path in (REPOSITORY / "docs").glob("recipes-*.md")}
    assert names == package_files() | START_UP | pages
    kinds = {Path(name).suffix for name in names}
    assert {".yaml", ".j2", ".css", ".js", ".typed"} <= kinds


def test_the_wheel_holds_no_file_that_few_need(wheel):
    with zipfile.ZipFile(wheel) as opened:
        assert [item.filename for item in opened.infolist() if item.file_size > 200_000] == []


def test_the_viewer_is_a_wheel_of_its_own(tmp_path):
    with zipfile.ZipFile(build_wheel(tmp_path, REPOSITORY / "packaging" / "niivue")) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
        text = opened.read("nnunet_flare_niivue/LICENSES.txt").decode("utf-8")
        (metadata,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        version = message_from_string(opened.read(metadata).decode("utf-8"))["Version"]
    assert names == {f"nnunet_flare_niivue/{name}" for name in ("__init__.py", "niivue.umd.js", "LICENSES.txt")}
    assert f"version {version}, unchanged" in text


def test_the_source_archive_can_be_worked_on(archive):
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert package_files() <= names
    assert {f"packaging/{name}" for name in START_UP} <= names
    assert set(NEEDED_BY_CONTRIBUTORS) <= names
    assert not [name for name in names if name.startswith((".git/", ".venv", "build/", "flare_demo"))]


@pytest.mark.parametrize("form", ["wheel", "archive"])
def test_a_clean_environment_has_commands_data_and_plugin(form, request, tmp_path):
    environment = Environment(tmp_path)
    source = str(request.getfixturevalue(form))
    environment.pip("install", "--ignore-installed", "--no-deps", "--no-index", *NO_ISOLATION, source)
    assert {path.name for path in environment.site.glob("nnunet_flare_plugin.*")} == START_UP
    variables = {"PATH": f"{environment.python.parent}:/usr/bin:/bin"}
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        variables[name] = str(tmp_path / name)
        (tmp_path / name).mkdir()
    said = environment.run(str(environment.python.parent / "flare-doctor"), **variables)
    assert said.returncode == 0 and "no problem, " in said.stdout, said.stdout + said.stderr
    where = environment.call("import nnunet_flare; print(nnunet_flare.__file__)").stdout
    assert str(environment.site) in where
    shipped = resources.files("nnunet_flare.recipes").iterdir()
    assert int(environment.call(LOOK).stdout) == len([path for path in shipped if path.name.endswith(".yaml")])
    for command in (
        "flare-pseudolabel",
        "flare-predict",
        "flare-export",
        "flare-postprocess",
        "flare-evaluate",
        "flare-doctor",
    ):
        assert (environment.python.parent / command).is_file(), command


def test_the_version_is_the_same_everywhere(wheel):
    version = nnunet_flare.__version__
    with zipfile.ZipFile(wheel) as opened:
        (path,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(opened.read(path).decode("utf-8"))
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    (heading,) = re.findall(rf"^## {re.escape(version)} - (.+)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    assert metadata["Version"] == str(citation["version"]) == version and heading
    assert metadata["License-Expression"] == citation["license"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown" and "# nnunet-flare" in metadata.get_payload()


def test_the_repositorys_address_is_the_same_wherever_it_stands(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (path,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(opened.read(path).decode("utf-8"))
    urls = dict(entry.split(", ", 1) for entry in metadata.get_all("Project-URL") or ())
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    site = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    known = {urls.get("Repository"), citation.get("repository-code")}
    known.add(next(iter(re.findall(r"^repo_url: (\S+)", site, re.M)), None))
    assert len(known) == 1, known
    for page in ("README.md", "docs/install.md"):
        (address,) = re.findall(r"^git clone (\S+) nnunet-flare$", (REPOSITORY / page).read_text("utf-8"), re.M)
        assert address == (known.copy().pop() or "ADDRESS"), page


def test_the_citation_file_has_what_the_format_asks_for():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    for entry in (citation, *citation["references"]):
        assert entry["title"] and all("name" in author or "family-names" in author for author in entry["authors"])
    assert all(re.fullmatch(r"10\.\d{4,}/\S+", entry["doi"]) for entry in citation["references"] if "doi" in entry)


def test_the_matrix_runs_what_the_package_says_it_supports(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (path,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(opened.read(path).decode("utf-8"))
    pythons = [c.rpartition(" ")[2] for c in metadata.get_all("Classifier") or () if "Python :: 3." in c]
    (bound,) = (r for r in map(Requirement, metadata.get_all("Requires-Dist") or ()) if r.name == "nnunetv2")
    (oldest,) = (str(part.version) for part in bound.specifier if part.operator == ">=")
    jobs = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    matrix = jobs["linux"]["strategy"]["matrix"]
    assert matrix["python"] == pythons and metadata["Requires-Python"] == f">={pythons[0]}"
    (extra,) = matrix["include"]
    assert extra["python"] == pythons[0] and Version(extra["nnunet"].removeprefix("nnunetv2==")) == Version(oldest)
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert "make test" in lines[0] and any(line.startswith("flare-predict") for line in lines)
    named = [word for line in lines for word in line.split() if word.endswith(".py")]
    assert named and [word for word in named if not (REPOSITORY / word).is_file()] == []


def test_issue_forms_are_forms():
    forms = [path for path in (REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form["name"] and form["description"]
        ids = [entry["id"] for entry in form["body"]]
        assert len(ids) == len(set(ids)) and all(entry["attributes"]["label"] for entry in form["body"])
