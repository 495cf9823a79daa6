"""Files for those who find, cite, build or report: they agree with the tree they speak of.

`make lint` checks their form, against the published schemas.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ISSUE_FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
MAKE = re.compile(r"^\s*make (\S+)", re.MULTILINE)


def read(name: str) -> str:
    return (ROOT / name).read_text()


def load(name: str) -> dict:
    return yaml.safe_load(read(name))


def made_by(workflow: str) -> set[str]:
    """The targets of make that a workflow's steps name, once for each value of a job's matrix."""
    targets = set()
    for job in load(workflow)["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for run in (step["run"] for step in job["steps"] if "run" in step):
            for key, values in matrix.items():
                place = f"${{{{ matrix.{key} }}}}"
                run = "\n".join(run.replace(place, value) for value in values)
            targets |= set(MAKE.findall(run))
    return targets


def test_workflows_make_what_the_makefile_has():
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", read("Makefile"), re.MULTILINE))
    made = {file.name: made_by(f".github/workflows/{file.name}") for file in WORKFLOWS}
    assert made["ci.yml"] and set().union(*made.values()) <= targets, made


def test_the_public_workflow_makes_what_this_one_makes():
    assert made_by(".github/workflows/ci.yml") == set(MAKE.findall(read(".ci/run")))


def test_every_place_names_the_same_pythons():
    project = read("pyproject.toml")
    classifiers = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    (wheels,) = re.findall(r'^build = "cp3{([\d,]+)}-', project, re.MULTILINE)
    (floor,) = re.findall(r'^requires-python = ">=(.+)"', project, re.MULTILINE)
    (lowest,) = re.findall(r'^target-version = "py3(\d+)"', project, re.MULTILINE)
    tested = load(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert classifiers == tested == [f"3.{minor}" for minor in wheels.split(",")]
    assert classifiers[0] == floor == f"3.{lowest}"


def test_the_citation_is_of_this_version_and_of_the_paper_that_the_readme_names():
    citation = load("CITATION.cff")
    (version,) = re.findall(r"^project\(tidaldecode VERSION (\S+)", read("CMakeLists.txt"), re.M)
    assert citation["version"] == version
    assert f'description = "{citation["abstract"].rstrip(".")}"' in read("pyproject.toml")
    (paper,) = citation["references"]
    assert paper["url"] in read("README.md")
    assert paper["title"].startswith("TidalDecode: ")


def test_the_changelog_has_the_sections_of_keep_a_changelog_and_short_entries():
    known = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    title, *versions = re.split(r"^## ", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert title.split() == ["#", "Changelog"] and versions
    for version in versions:
        name, *sections = re.split(r"^### ", version, flags=re.MULTILINE)
        assert re.fullmatch(r"Unreleased|\d+\.\d+\.\d+ (\(unreleased\)|- [\d-]{10})", name.strip())
        texts = dict(section.split("\n", 1) for section in sections)
        assert len(texts) == len(sections) and list(texts) == [k for k in known if k in texts], name
        for entry in "".join(texts.values()).split("\n"):
            words = entry.removeprefix("- ").split()
            assert not entry or (entry.startswith("- ") and len(words) <= 20), entry


def test_a_warning_keeps_nobody_from_installing(tmp_path: Path):
    cmake = Path(sys.executable).with_name("cmake")
    if not cmake.exists():
        pytest.skip("there is no cmake beside this Python: run `make test`")
    options = ("-DTIDAL_CUDA=OFF", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path, *options, f"-DPython_EXECUTABLE={sys.executable}"],
        check=True,
    )
    commands = [c["command"] for c in json.loads((tmp_path / "compile_commands.json").read_text())]
    assert all("-Wall" in command and "-Werror" not in command for command in commands) and commands


@pytest.mark.parametrize("form", ISSUE_FORMS, ids=lambda form: form.stem)
def test_issue_forms_ask_for_what_info_tells(form: Path):
    text = form.read_text()
    fields = yaml.safe_load(text)["body"]
    (info,) = [f for f in fields if "`tidaldecode info" in f["attributes"].get("label", "")]
    assert info["validations"]["required"]
    for command in set(re.findall(r"`tidaldecode (\w+)", text)):
        subprocess.run([sys.executable, "-m", "tidaldecode", command, "--help"], check=True)


def test_there_is_a_form_for_bugs_and_one_for_families():
    assert [form.stem for form in ISSUE_FORMS] == ["bug", "model_family"]
