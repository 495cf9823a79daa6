"""The process that handles text: what folders and callers do to it reaches nobody else."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scripted_model import BOS, SCRIPT, write_byte_tokenizer, write_scripted_model
from tidaldecode import Decoder
from tidaldecode.errors import ConfigError, InvalidArgument, TidalError, UnsupportedError
from tidaldecode.text import text_process
from tidaldecode.text.text_process import TextProcess
from tidaldecode.text.tokenizer import Tokenizer

USER = [{"role": "user", "content": "x"}]
OPTIONS = {"device": "cpu", "attention": "full", "max_seq_len": 64, "num_threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("scripted"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_byte_tokenizer(tmp_path), 320)


def child_of(tokenizer: Tokenizer) -> int:
    (running,) = tokenizer._process._held
    return running.process.pid


def is_gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends within this time and leaves no zombie."""
    end = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


# What a folder does


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ (10 ** 100000000) % 7 }}", "still running after 0.5"),
        ("{{ 'a' * 10000000000 }}", "needs more than the 2.0 GiB"),
        ("{% set ns = namespace(x='a' * 1000000) %}{% for i in range(60) %}"
         "{% set ns.x = ns.x + ns.x %}{% endfor %}", "GiB it may take|still running"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
         "still running after 0.5"),
        ("{{ '\ud83d' }}", "gave a lone surrogate at 0"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "chat template"),
        ("{{ range(10 ** 9) | list }}", "chat template"),
        ("{{ '%9999999999d' % 1 }}", "chat template"),
        ("{{ 'x'.__class__.__mro__ }}", "chat template"),
    ],
)  # fmt: skip
def test_a_hostile_template_ends_its_process_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, expected: str
):
    monkeypatch.setattr("tidaldecode.text.tokenizer.TEMPLATE_SECONDS", 0.5)
    tokenizer = Tokenizer(write_byte_tokenizer(tmp_path, chat_template=template), 320)
    beats = [time.monotonic()]
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.01):
            beats.append(time.monotonic())

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(ConfigError, match=expected) as error:
        tokenizer.render_chat(USER)
    stop.set()
    thread.join()
    assert str(error.value).isprintable() and len(str(error.value)) < 600
    assert max(b - a for a, b in zip(beats, beats[1:], strict=False)) < 3.0
    assert tokenizer.encode("a") == [BOS, 97]
    assert tokenizer.decode([97]) == "a"


def rewrite(folder: Path, **parts) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return folder


def test_a_tokenizer_that_floods_is_refused(tmp_path: Path):
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100_000}
    folder = rewrite(write_byte_tokenizer(tmp_path), decoder=grow)
    tokenizer = Tokenizer(folder, 320)
    with pytest.raises(ConfigError, match="far more than a text may|GiB it may take"):
        tokenizer.decode([97] * 4000)
    assert tokenizer.decode([98]) == "b"


SLOW_REGEX = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated",
              "invert": False}  # fmt: skip


def growing(times: int) -> dict:
    grow = {"type": "Replace", "pattern": {"String": "x"}, "content": "xx"}
    return {"type": "Sequence", "normalizers": [grow] * times}


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": SLOW_REGEX},
        {"normalizer": growing(34)},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}},
        {"decoder": {"type": "Strip", "content": "x", "start": 10**9, "stop": 10**9}},
        {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [],
                            "special_tokens": {}}},
    ],
)  # fmt: skip
def test_a_hostile_tokenizer_ends_its_process_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: dict
):
    monkeypatch.setattr("tidaldecode.text.tokenizer._SECONDS", 0.5)
    folder = rewrite(write_byte_tokenizer(tmp_path), **parts)
    start = time.monotonic()
    try:
        tokenizer = Tokenizer(folder, 320)
        ids = tokenizer.encode("x" * 40)
        assert isinstance(tokenizer.decode([120, *ids]), str)
    except TidalError as error:
        assert type(error) is ConfigError
        assert str(folder) in str(error) and str(error).isprintable()
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "vocab", [{"a": 2**32 - 1}, {"a": 2**31}, {"a": 2**63}, {"a": -1}, {"a": 1.5}, {"a": None}]
)
def test_ids_of_a_tokenizer_are_checked_like_a_callers(tmp_path: Path, vocab: dict):
    model = {"type": "WordLevel", "vocab": {"u": 0} | vocab, "unk_token": "u"}
    folder = rewrite(
        write_byte_tokenizer(tmp_path), model=model, added_tokens=[], post_processor=None,
        pre_tokenizer={"type": "WhitespaceSplit"}, decoder=None,
    )  # fmt: skip
    try:
        tokenizer = Tokenizer(folder, 320)
    except ConfigError:
        return
    assert tokenizer.encode("u") == [0]
    with pytest.raises(InvalidArgument, match="holds the token 'a', whose id is"):
        tokenizer.encode("u a")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid x", "git-lfs pointer"),
        ("tokenizer.json", b"\n<!DOCTYPE html><html>", "an HTML page, expected JSON"),
        ("tokenizer_config.json", b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
        ("tokenizer_config.json", b"<html>", "an HTML page, expected JSON"),
        ("tokenizer_config.json", b" " * (9 << 20), "9437184 bytes, expected at most"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: expected a JSON object"),
        ("tokenizer_config.json", b'{"bos_token": 5}', "bos_token: expected a token"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 1}}', "added_tokens_decoder"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": 5}', "added_tokens_decoder"),
        ("tokenizer_config.json", b"[" * 100_000, "not valid JSON|nested"),
        ("special_tokens_map.json", b"\xff\xfe", "special_tokens_map.json: is not UTF-8"),
        ("added_tokens.json", b'{"x": "y"}', "added_tokens.json"),
        ("tokenizer.json", b"", "tokenizer"),
        ("tokenizer.json", b"[" * 1_000_000, "tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "WordLevel"}}', "tokenizer"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, expected: str):
    folder = write_byte_tokenizer(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as error:
        Tokenizer(folder, 320)
    assert str(error.value).isprintable()


def test_files_that_are_none_are_refused_at_once(tmp_path: Path):
    folder = write_byte_tokenizer(tmp_path)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(ConfigError, match="not a regular file"):
        Tokenizer(folder, 320)


def test_files_that_are_not_used_may_be_anything(tmp_path: Path):
    folder = write_byte_tokenizer(tmp_path)
    path = folder / "tokenizer_config.json"
    listed = {"added_tokens_decoder": {"256": {"content": "<s>", "special": True}}}
    path.write_text(json.dumps(json.loads(path.read_text()) | listed))
    for name in ("special_tokens_map.json", "added_tokens.json", "chat_template.json"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1")
    for name in ("vocab.json", "tokenizer.model"):
        os.mkfifo(folder / name)
    tokenizer = Tokenizer(folder, 320)
    assert tokenizer.encode("a") == [BOS, 97]
    assert tokenizer.decode(tokenizer.render_chat(USER)) == "[user]x>"


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
def test_a_template_file_that_is_none_spoils_only_chats(tmp_path: Path, name: str):
    folder = write_byte_tokenizer(tmp_path)
    (folder / "additional_chat_templates").mkdir()
    os.mkfifo(folder / name)
    tokenizer = Tokenizer(folder, 320)
    assert tokenizer.encode("a") == [BOS, 97]
    with pytest.raises(ConfigError, match="chat template: .*is not a regular file"):
        tokenizer.render_chat(USER)


def test_a_program_that_has_closed_its_standard_files_keeps_their_numbers(folder: Path):
    program = (
        "import os, sys\nos.close(0); os.close(1); os.close(2)\n" + OPEN.replace("print(", "str(")
        .replace(", flush=True", "")
        + "ok = running.socket.fileno() > 2 and decoder.encode('a') == [256, 97]\n"
        "os._exit(0 if ok else 7)"
    )  # fmt: skip
    assert run_program(program, str(folder)).returncode == 0


def test_a_broken_tokenizer_spoils_text_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = write_scripted_model(tmp_path)
    (folder / "tokenizer.json").write_text("{")
    with Decoder(folder, **OPTIONS, max_batch_size=1) as decoder:
        assert "token ids work, text does not" in caplog.text
        result = decoder.generate([62], max_new_tokens=3)
        assert result.text is None and len(result.token_ids) == 3
        with decoder.session() as session:
            session.append([62])
            assert session.generate(max_new_tokens=2).text is None
        for call in (
            lambda: decoder.generate("x"),
            lambda: decoder.generate([62], stop="x"),
            lambda: decoder.stream([62]),
            lambda: decoder.encode("x"),
            lambda: decoder.decode([62]),
            lambda: decoder.chat(USER),
            lambda: decoder.session().append("x"),
        ):
            with pytest.raises(ConfigError, match="the tokenizer cannot be loaded"):
                call()


def test_a_folder_without_tokenizer_json_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "vocab.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'tidaldecode\[hf\]'"):
        Tokenizer(tmp_path, 320)


def test_transformers_makes_a_tokenizer_of_other_files(tmp_path: Path):
    pytest.importorskip("transformers")
    write_byte_tokenizer(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"] | {"<s>": 256, "</s>": 257}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "unk_token": "</s>",
              "chat_template": "{{ bos_token }}{{ messages[0].content }}"}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(tmp_path, 320)
    assert tokenizer.encode("aé") == [97, *"é".encode()]
    assert tokenizer.render_chat(USER) == [BOS, 120]


# What happens around it


def test_a_folder_is_read_in_the_constructor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_scripted_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    decoder = Decoder("model", **OPTIONS, max_batch_size=1)
    monkeypatch.chdir("/")
    assert decoder.generate(">").text == SCRIPT
    os.kill(child_of(decoder._frontend.tokenizer), signal.SIGKILL)
    time.sleep(0.1)
    assert decoder.encode("a") == [BOS, 97]  # another one has been started
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert decoder.generate(">").text == SCRIPT


def test_it_ends_with_its_decoder_and_leaves_no_zombie(folder: Path):
    decoder = Decoder(folder, **OPTIONS, max_batch_size=1)
    pid = child_of(decoder._frontend.tokenizer)
    decoder.close()
    assert is_gone(pid, 1.0)
    for call, value in ((decoder.encode, "a"), (decoder.decode, [97])):
        with pytest.raises(InvalidArgument, match="closed"):
            call(value)
    dropped = Decoder(folder, **OPTIONS, max_batch_size=1)
    pid = child_of(dropped._frontend.tokenizer)
    del dropped
    assert is_gone(pid, 1.0)


def test_a_decoder_that_cannot_be_made_leaves_none(tmp_path: Path):
    folder = write_scripted_model(tmp_path)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    before = set(os.listdir("/proc"))
    with pytest.raises(TidalError):
        Decoder(folder, **OPTIONS)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    if children.exists():
        assert not set(children.read_text().split()) - before


def run_program(text: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", text, *arguments], capture_output=True, text=True, timeout=120,
        check=False, **options,
    )  # fmt: skip


OPEN = """
import os, sys, threading, time
from pathlib import Path
import tidaldecode
decoder = tidaldecode.Decoder(sys.argv[1], device="cpu", max_seq_len=64, num_threads=1)
(running,) = decoder._frontend.tokenizer._process._held
print(running.process.pid, flush=True)
"""


@pytest.mark.parametrize(
    "end",
    ["", "sys.exit(3)", "os._exit(0)", "os.kill(os.getpid(), 9)", "raise ValueError",
     "threading.Thread(target=lambda: [decoder.encode('a') for _ in iter(int, 1)], "
     "daemon=True).start(); time.sleep(0.2)"],
)  # fmt: skip
def test_it_ends_with_its_program_however_that_ends(folder: Path, end: str):
    done = run_program(OPEN + end, str(folder))
    assert is_gone(int(done.stdout.split()[0]))
    assert "Fatal" not in done.stderr and done.returncode != -6


def test_it_does_not_outlive_a_program_that_a_fork_outlives(folder: Path):
    """The fork holds a copy of the socket, so no end of file says that the parent has gone."""
    done = run_program(
        OPEN + "pid = os.fork()\nif pid == 0:\n    os.close(1); os.close(2); time.sleep(25)\n",
        str(folder),
    )
    assert is_gone(int(done.stdout.split()[0]), 15.0)


def test_ctrl_c_ends_a_wait_and_not_the_process_of_others(folder: Path, tmp_path: Path):
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    slow = write_scripted_model(tmp_path)
    write_byte_tokenizer(slow, chat_template=template)
    program = OPEN + (
        "import signal\n"
        "threading.Timer(1.0, lambda: os.killpg(0, signal.SIGINT)).start()\n"
        "start = time.monotonic()\n"
        "try:\n    decoder.chat([{'role': 'user', 'content': 'x'}])\n"
        "except KeyboardInterrupt:\n    print('interrupted', time.monotonic() - start < 3)\n"
        "print(decoder.encode('a'))\n"
    )
    done = run_program(program, str(slow), start_new_session=True)
    assert done.stdout.split("\n")[1:3] == ["interrupted True", f"[{BOS}, 97]"], done.stderr


def test_it_inherits_no_descriptors_and_ignores_interrupts(tokenizer: Tokenizer):
    with open("/dev/null") as file:
        os.set_inheritable(file.fileno(), True)
        own = Tokenizer(tokenizer._folder, 320)
        links = Path(f"/proc/{child_of(own)}/fd").iterdir()
        names = sorted(os.readlink(link).split(":")[0] for link in links)
    assert names in (["/dev/null", "/dev/null", "socket"], ["/dev/null"] * 2 + ["socket"])
    os.kill(child_of(own), signal.SIGINT)
    assert own.encode("a") == [BOS, 97]


def test_many_threads_are_all_answered(folder: Path):
    with Decoder(folder, **OPTIONS, max_batch_size=1) as decoder:
        answers: list = []

        def ask(index: int) -> None:
            text = chr(97 + index) * 5
            for _ in range(20):
                ids = decoder.encode(text)
                answers.append(decoder.decode(ids) == text and ids == [BOS, *text.encode()])
            answers.append(decoder.generate(">").text == SCRIPT)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [True] * (8 * 21)


def test_closing_while_others_ask_gives_them_an_error(tokenizer: Tokenizer):
    outcomes: list = []

    def ask() -> None:
        try:
            while True:
                tokenizer.encode("a" * 1000)
        except InvalidArgument as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    tokenizer.close()
    for thread in threads:
        thread.join(20)
    assert len(outcomes) == 4 and all("closed" in text for text in outcomes)


def _ask_in_child(tokenizer: Tokenizer, results) -> None:
    results.put((tokenizer.encode("child"), child_of(tokenizer)))


def test_a_fork_asks_a_process_of_its_own(tokenizer: Tokenizer):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    forks = [context.Process(target=_ask_in_child, args=(tokenizer, results)) for _ in range(2)]
    lock = tokenizer._process._lock
    with lock:  # as if another thread were asking
        for fork in forks:
            fork.start()
    answers = [results.get(timeout=60) for _ in forks]
    for fork in forks:
        fork.join()
    pids = {pid for _, pid in answers}
    assert [ids for ids, _ in answers] == [[BOS, *b"child"]] * 2
    assert len(pids | {child_of(tokenizer)}) == 3
    assert tokenizer.encode("a") == [BOS, 97]
    assert all(is_gone(pid) for pid in pids)


def test_a_long_text_is_no_hostile_one(tokenizer: Tokenizer):
    text = "The sky over the harbour was grey. é\n" * 60_000
    ids = tokenizer.encode(text)
    assert bytes(ids[1:]).decode() == text
    assert tokenizer.decode(ids) == text


def test_a_process_that_cannot_be_started_is_a_typed_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for executable, expected in (("", "sys.executable is empty"), ("/none", "cannot start /none")):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(UnsupportedError, match=expected):
            Tokenizer(folder, 320)
        with Decoder(folder, **OPTIONS, max_batch_size=1) as decoder:
            assert len(decoder.generate([62], max_new_tokens=2).token_ids) == 2
            with pytest.raises(UnsupportedError, match=expected):
                decoder.generate("x")


def test_prompts_are_one_request_and_answers_of_bytes_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    real = TextProcess.call

    def count(self, name, arguments, limits):
        asked.append(name)
        return real(self, name, arguments, limits)

    monkeypatch.setattr(text_process.TextProcess, "call", count)
    with Decoder(folder, **OPTIONS, max_batch_size=2) as decoder:
        assert [r.text for r in decoder.generate([">", "x>"])] == [SCRIPT] * 2
        # The bytes of tokens are asked for once, those of many together.
        assert asked[0] == "encode" and 1 <= asked.count("token_bytes") == len(asked) - 1 <= 2
        asked.clear()
        assert "".join(decoder.stream(">")) == SCRIPT
        assert asked == ["encode"]
        asked.clear()
        decoder.generate([[62], [62]], stop=["zzz"])
        assert not asked
