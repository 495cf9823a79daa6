"""Models by path or hub id: the hub's cache on this machine, and downloads through a stand-in."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tidaldecode import ConfigError, Decoder, WeightsError
from tidaldecode.checkpoint import hub
from tidaldecode.checkpoint.model_folder import at_revision, read_model_folder
from tidaldecode.cli.app import main
from tiny_models import TinyModel, write_checkpoint, write_tokenizer

try:
    import huggingface_hub as LIBRARY
    from huggingface_hub import errors as LIBRARY_ERRORS
except ImportError:
    LIBRARY = ModuleType("huggingface_hub")
    LIBRARY_ERRORS = None

MODEL = TinyModel(num_layers=2)
COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no library to fill it."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return tmp_path / "hub"


def write_cached(
    cache: Path, repo: str = "org/name", commit: str = COMMIT, ref: str = "main"
) -> Path:
    """A model as the hub's library keeps it: links into blobs. Returns models--org--name."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = write_checkpoint(folder / "snapshots" / commit, MODEL)
    (folder / "blobs").mkdir(exist_ok=True)
    for path in list(snapshot.iterdir()):
        blob = folder / "blobs" / f"{commit[0]}{path.name}"
        path.rename(blob)
        path.symlink_to(Path("../../blobs") / blob.name)
    (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    return folder


# Paths


def test_a_tilde_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_checkpoint(tmp_path / "models" / "m", MODEL)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_model_folder("~/models/m").path == tmp_path / "models" / "m"
    assert read_model_folder(Path("~/models/m")).path == tmp_path / "models" / "m"
    with pytest.raises(ConfigError, match="no such folder"):
        read_model_folder("~nobody-of-this-name/m")


def test_a_folder_whose_name_has_an_at_sign_is_itself(tmp_path: Path):
    write_checkpoint(tmp_path / "m@v1", MODEL)
    assert read_model_folder(tmp_path / "m@v1").name == "m@v1"


def test_a_local_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch, own_hub_cache: Path):
    write_cached(own_hub_cache)
    write_checkpoint(tmp_path / "org" / "name", MODEL)
    monkeypatch.chdir(tmp_path)
    assert read_model_folder("org/name").path == Path("org/name")


def test_a_local_folder_has_no_revisions(tmp_path: Path):
    write_checkpoint(tmp_path / "m", MODEL)
    with pytest.raises(ConfigError, match="revision: got 'v1' with the local folder"):
        Decoder(tmp_path / "m", revision="v1", device="cpu")


def test_an_adapter_without_its_model_is_called_so(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no config.json in it.*adapter.*merge"):
        read_model_folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a",
        "a/b/c",
        "/a/b",
        "./a/b",
        "../b",
        "a/..",
        "-a/b",
        "a--b/c",
        "a/b\n",
        "a\\b",
        "\ud800",
    ],
)
def test_what_is_no_hub_id_is_a_path(name: str):
    with pytest.raises(ConfigError, match="expected a|model_dir"):
        read_model_folder(name)


# The cache


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"HF_HUB_CACHE": "{}/a"}, "a"),
        ({"HUGGINGFACE_HUB_CACHE": "{}/b"}, "b"),
        ({"HF_HOME": "{}/c"}, "c/hub"),
        ({"XDG_CACHE_HOME": "{}/d"}, "d/huggingface/hub"),
        ({"XDG_CACHE_HOME": "", "HOME": "{}/e"}, "e/.cache/huggingface/hub"),
        ({"HF_HUB_CACHE": "~/f", "HOME": "{}"}, "f"),
        ({"HF_HOME": "$HOME/g", "HOME": "{}"}, "g/hub"),
        ({"HF_HOME": "", "HF_HUB_CACHE": "{}/h", "XDG_CACHE_HOME": "/x"}, "h"),
    ],
    ids=str,
)
def test_the_cache_is_where_the_library_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], place: str
):
    monkeypatch.delenv("HF_HUB_CACHE")
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert hub.hub_cache_dir() == tmp_path / place
    write_cached(tmp_path / place)
    assert read_model_folder("org/name").path.name == COMMIT


def test_a_hub_id_is_found_without_any_library(own_hub_cache: Path):
    write_cached(own_hub_cache)
    folder = read_model_folder("org/name")
    assert folder.path == own_hub_cache / "models--org--name" / "snapshots" / COMMIT
    assert folder.name == "org/name"
    with Decoder("org/name", device="cpu", attention="full", max_seq_len=64) as decoder:
        assert len(decoder.generate([5, 6], max_new_tokens=3).token_ids) == 3


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/2", OTHER])
def test_a_revision_is_a_branch_a_tag_or_a_commit(own_hub_cache: Path, revision: str):
    write_cached(own_hub_cache)
    write_cached(own_hub_cache, commit=OTHER, ref=revision if revision != OTHER else "other")
    assert read_model_folder(f"org/name@{revision}").path.name == OTHER
    with Decoder("org/name", revision=revision, device="cpu", attention="full") as decoder:
        assert decoder.folder.path.name == OTHER
    assert read_model_folder("org/name").path.name == COMMIT


def test_a_cache_folder_given_directly_is_its_snapshot(own_hub_cache: Path):
    folder = write_cached(own_hub_cache)
    assert read_model_folder(folder).path.name == COMMIT
    write_cached(own_hub_cache, commit=OTHER, ref="v1")
    assert read_model_folder(folder).path.name == COMMIT
    assert read_model_folder(f"{folder}@v1").path.name == OTHER
    (folder / "refs" / "main").unlink()
    with pytest.raises(
        ConfigError, match=f"no revision 'main'; snapshots there: '{COMMIT}', '{OTHER}"
    ):
        read_model_folder(folder)
    shutil.rmtree(folder / "snapshots" / OTHER)
    assert read_model_folder(folder).path.name == COMMIT  # the only one


def test_a_ref_that_leads_out_of_the_cache_is_none(own_hub_cache: Path, tmp_path: Path):
    write_checkpoint(tmp_path / "elsewhere", MODEL)
    folder = write_cached(own_hub_cache)
    (folder / "refs" / "main").write_text("../../../elsewhere")
    with pytest.raises(ConfigError, match="not in the Hugging Face cache"):
        read_model_folder("org/name")


@pytest.mark.parametrize("revision", ["../x", "/etc", "", "a b", "a/../b", 5, b"v1", "-x"])
def test_a_revision_that_cannot_be_one_is_refused(own_hub_cache: Path, revision: Any):
    write_cached(own_hub_cache)
    with pytest.raises(ConfigError, match="revision: got"):
        Decoder("org/name", revision=revision, device="cpu")


def test_a_revision_is_given_once():
    assert at_revision("org/name@v1", "v1") == "org/name@v1"
    with pytest.raises(ConfigError, match="revision: got 'v2', but model_dir names 'v1'"):
        at_revision("org/name@v1", "v2")


def test_without_weights_a_config_is_enough(own_hub_cache: Path):
    folder = write_cached(own_hub_cache)
    (folder / "snapshots" / COMMIT / "model.safetensors").unlink()
    assert read_model_folder("org/name", "dummy").path.name == COMMIT
    with pytest.raises(ConfigError, match="only in part in the Hugging Face cache"):
        read_model_folder("org/name")
    with pytest.raises(WeightsError, match="no weights"):
        read_model_folder(folder)


def test_a_cache_that_may_not_be_read_is_no_cache(own_hub_cache: Path):
    own_hub_cache.write_text("a file")
    with pytest.raises(ConfigError, match="not in the Hugging Face cache"):
        read_model_folder("org/name")


def test_without_the_library_both_ways_out_are_named(own_hub_cache: Path):
    with pytest.raises(ConfigError) as error:
        read_model_folder("meta-llama/Llama-3.1-8B@v2")
    message = str(error.value)
    assert str(own_hub_cache) in message
    assert "pip install 'tidaldecode[hf]'" in message
    assert "hf download meta-llama/Llama-3.1-8B --revision v2 --local-dir Llama-3.1-8B" in message


# Downloads


class Hub:
    """Stands in for huggingface_hub: one model, or an error."""

    FILES = (
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md",
        "chat_template.jinja", "pytorch_model.bin", "modeling_custom.py", "original/params.json",
        "consolidated.safetensors", "onnx/model.onnx", "onnx/config.json", "model.gguf",
        "training_args.bin", "trainer_state.json",
    )  # fmt: skip

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.calls: list[tuple[str, str]] = []
        self.taken: set[str] = set()

    def snapshot_download(
        self, repo: str, *, revision: str, cache_dir: Path, allow_patterns: list[str]
    ) -> str:
        self.calls.append((repo, revision))
        if self.error is not None:
            raise self.error
        self.taken = {f for f in self.FILES if any(fnmatch(f, p) for p in allow_patterns)}
        folder = write_cached(Path(cache_dir), repo, ref=revision)
        write_tokenizer(folder / "snapshots" / COMMIT, MODEL.vocab_size)
        return str(folder / "snapshots" / COMMIT)


MakeHub = Callable[..., Hub]


@pytest.fixture
def make_hub(monkeypatch: pytest.MonkeyPatch) -> MakeHub:
    def make(error: BaseException | None = None) -> Hub:
        stand_in = Hub(error)
        monkeypatch.setitem(sys.modules, "huggingface_hub", LIBRARY)
        monkeypatch.setattr(LIBRARY, "snapshot_download", stand_in.snapshot_download, raising=False)
        return stand_in

    return make


def test_what_is_not_there_is_downloaded_once(make_hub: MakeHub, own_hub_cache: Path, caplog):
    stand_in = make_hub()
    caplog.set_level(logging.INFO, logger="tidaldecode")
    folder = read_model_folder("org/name@v1")
    assert folder.path == own_hub_cache / "models--org--name" / "snapshots" / COMMIT
    assert (
        f"org/name@v1: not in the Hugging Face cache; downloading to {own_hub_cache}" in caplog.text
    )
    assert read_model_folder("org/name@v1").path == folder.path
    assert stand_in.calls == [("org/name", "v1")]


def test_only_settings_weights_and_tokenizer_are_downloaded(make_hub: MakeHub):
    stand_in = make_hub()
    read_model_folder("org/name")
    assert stand_in.taken == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip


def test_a_part_of_a_model_is_completed(make_hub: MakeHub, own_hub_cache: Path):
    folder = write_cached(own_hub_cache)
    snapshot = folder / "snapshots" / COMMIT
    (snapshot / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    stand_in = make_hub(RuntimeError("stopped"))
    with pytest.raises(ConfigError, match="only in part.*the download failed: 'stopped'"):
        read_model_folder("org/name")
    assert stand_in.calls == [("org/name", "main")]


def error_of(name: str, base: type[Exception] = Exception, text: str = "long text") -> Exception:
    return type(name, (base,), {})(text)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (error_of("RepositoryNotFoundError"), "is the name right"),
        (error_of("GatedRepoError", type("RepositoryNotFoundError", (Exception,), {})), "consent"),
        (error_of("RevisionNotFoundError"), "no such revision"),
        (error_of("OfflineModeIsEnabled", ConnectionError), "HF_HUB_OFFLINE is set"),
        (error_of("LocalEntryNotFoundError", FileNotFoundError), "no connection to the hub"),
        (ConnectionError("refused"), "no connection to the hub"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("two\nlines"), "two lines"),
        (RuntimeError(), "RuntimeError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_failed_download_says_why_and_what_to_do(make_hub: MakeHub, error, expected: str):
    make_hub(error)
    with pytest.raises(ConfigError, match=expected) as raised:
        read_model_folder("org/name")
    assert "hf download org/name --local-dir name" in str(raised.value)


def test_an_interrupted_download_stays_an_interrupt(make_hub: MakeHub):
    make_hub(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        read_model_folder("org/name")


def test_the_real_library_has_the_call_that_is_made():
    if not hasattr(LIBRARY, "snapshot_download"):
        pytest.skip("huggingface_hub is not installed")
    parameters = inspect.signature(LIBRARY.snapshot_download).parameters
    assert {"revision", "cache_dir", "allow_patterns"} <= set(parameters)
    kinds = {name for name in hub._ADVICE if name not in ("ConnectionError", "ConnectError")}
    assert all(hasattr(LIBRARY_ERRORS, kind) for kind in kinds)


# The command line


def test_commands_take_hub_ids_and_revisions(make_hub: MakeHub, capfd, own_hub_cache: Path):
    stand_in = make_hub()
    arguments = ["--device", "cpu", "--revision", "v1"]
    assert main(["generate", "org/name", "t5 t6", "-n", "3", *arguments]) == 0
    assert len(capfd.readouterr().out.split()) == 3
    assert main(["info", "org/name", *arguments]) == 0
    assert "org/name" in capfd.readouterr().out
    assert stand_in.calls == [("org/name", "v1")]
    assert main(["info", "org/nothing@v1/../x"]) == 2
    assert "revision: got" in capfd.readouterr().err
