"""What `tidaldecode info` prints: the installation, and a model folder without loading it."""

from __future__ import annotations

import platform

from rich.console import Console
from rich.table import Table

from tidaldecode import _core
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.cli.terminal import one_line
from tidaldecode.config import PlanConfig
from tidaldecode.memory_plan import MemoryPlan
from tidaldecode.plan_bytes import bytes_per_step
from tidaldecode.plans import (
    HOW_TO_CHOOSE,
    Plan,
    find_plan,
    layers_free_to_choose,
    plan_letters,
    safe_config,
)
from tidaldecode.text.tokenizer import Tokenizer

_GIB = 1024**3
_LABEL_WIDTH = 16
_CONTEXTS = (8192, 32768, 131072)


def _print_pairs(console: Console, title: str, pairs: list[tuple[str, str]]) -> None:
    """Two columns under a title; long values wrap inside theirs."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, min_width=_LABEL_WIDTH)
    grid.add_column(overflow="fold")
    for label, value in pairs:
        grid.add_row("  " + one_line(label), one_line(value))
    console.print(title, style="bold")
    console.print(grid)


def show_installation(console: Console) -> None:
    """Version, devices and libraries, and why a backend is off."""
    versions = [
        ("tidaldecode", _core.version()),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("CUDA backend", _core.cuda_build()),
    ]
    _print_pairs(console, "Versions", versions)
    devices = []
    for entry in _core.list_devices():
        state = entry["hardware"] if entry["available"] else f"off: {entry['reason']}"
        if entry["memory_bytes"]:
            free = entry["free_bytes"] / _GIB
            state += f", {free:.1f} of {entry['memory_bytes'] / _GIB:.1f} GiB free"
        devices.append((entry["name"], state))
    _print_pairs(console, "Devices", devices)
    _print_pairs(console, "Libraries", _core.list_libraries())


def show_model(console: Console, folder: ModelFolder) -> None:
    """What a folder holds, from its JSON files and weight headers.

    Raises: ConfigError for a plan file that is wrong.
    """
    plan = find_plan(folder)
    _print_pairs(console, "Model", _describe(folder, plan))
    _print_pairs(console, "Bytes that a step of one sequence reads", _describe_steps(folder, plan))


def show_memory(console: Console, plan: MemoryPlan) -> None:
    """A decoder's memory by purpose, and whether it is there."""
    _print_pairs(console, plan.title(), plan.rows())
    if plan.problem:
        console.print(f"It does not fit. {one_line(plan.problem)}", style="bold", markup=False)


def _describe_rotation(model: ModelConfig) -> str:
    rope = model.rope
    text = f"RoPE base {rope.theta:g}"
    if rope.type != "default":
        text += f", {rope.type}" + ("" if rope.type == "longrope" else f" x{rope.factor:g}")
    if rope.rotary_dim:
        text += f", {rope.rotary_dim} of {model.head_dim} dims turn"
    still = sum(not layer.has_rope for layer in model.layers)
    text += f", none in {still} of {model.num_layers} layers" if still else ""
    if model.window_rope is None:
        return text
    other = model.window_rope
    return (
        text
        + f"; in a window base {other.theta:g}"
        + ("" if other.type == "default" else f", {other.type} x{other.factor:g}")
    )


def _describe_layers(model: ModelConfig) -> str:
    text = f"{model.num_layers}, hidden {model.hidden_size}, MLP {model.intermediate_size}"
    experts = sum(layer.has_experts for layer in model.layers)
    if experts:
        text += f"; {experts} have {model.num_experts} experts of {model.expert_intermediate_size}"
        text += f", {model.experts_per_token} a token"
        if model.shared_expert_size:
            text += f", and one of {model.shared_expert_size} for all"
    windows = sorted({window for window in model.windows if window})
    for window in windows:
        text += f"; {model.windows.count(window)} see a window of {window:,} tokens"
    return text


def _describe(folder: ModelFolder, plan: Plan | None) -> list[tuple[str, str]]:
    model = folder.model
    num_weights = sum(_num_elements(entry.shape) for entry in folder.weights)
    num_files = len({entry.path for entry in folder.weights})
    stored = "quantised" if folder.quantization else folder.dtype
    kv_values = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    plan_text = f"none; {HOW_TO_CHOOSE}"
    if plan is not None:
        letters = plan_letters(model.windows, plan.config)
        budget = plan.config.token_budget or _core.DecodeConfig().token_budget
        plan_text = f"{letters}, token budget {budget} ({plan.description})"
        if plan.measured and not plan.is_published:
            plan_text += f"; {plan.measured}"
    return [
        ("name", f"{folder.name} ({folder.family})"),
        ("parameters", f"{num_weights / 1e6:,.1f} million"),
        (
            "weights",
            f"{folder.weight_bytes / 1e6:,.1f} MB, {stored}, "
            f"{num_files} {'file' if num_files == 1 else 'files'}",
        ),
        *_describe_quantization(folder),
        ("layers", _describe_layers(model)),
        ("heads", f"{model.num_q_heads} query, {model.num_kv_heads} KV, size {model.head_dim}"),
        ("positions", f"{model.max_position_embeddings:,}, {_describe_rotation(model)}"),
        ("vocabulary", f"{model.vocab_size:,}, tokenizer: "
                       f"{'yes' if Tokenizer.exists(folder.path) else 'none'}"),
        ("end of text", ", ".join(map(str, folder.eos_token_ids)) or "no token"),
        ("KV cache", f"{2 * kv_values:,} bytes per token in 16 bits, {4 * kv_values:,} in 32"),
        ("sampling", _describe_sampling(folder)),
        ("plan", plan_text),
    ]  # fmt: skip


def _describe_steps(folder: ModelFolder, plan: Plan | None) -> list[tuple[str, str]]:
    """By context: weights with keys and values, dense and sparse, and what the latter can gain."""
    model = folder.model
    config, name = (plan.config, "the plan") if plan else (None, "every layer chooses")
    if config is None and layers_free_to_choose(model.windows):
        config = safe_config(model.windows)
    rows = []
    for context in sorted({*_CONTEXTS, model.max_position_embeddings}):
        if context > model.max_position_embeddings:
            break
        dense = bytes_per_step(folder, PlanConfig(), context)
        text = f"dense {_amount(dense)}"
        if config is not None:
            sparse = bytes_per_step(folder, config, context)
            text += f"; {name} {_amount(sparse)}, at best {dense / sparse:.1f}x as fast"
        rows.append((f"{context:,} tokens", text))
    return rows


def _amount(num_bytes: int) -> str:
    unit, name = (1e9, "GB") if num_bytes >= 1e9 else (1e6, "MB")
    return f"{num_bytes / unit:.3g} {name}"


def _describe_quantization(folder: ModelFolder) -> list[tuple[str, str]]:
    """What a quantised checkpoint is, and what the engine makes of it."""
    quantization = folder.quantization
    if quantization is None:
        return []
    text = (
        f"{quantization.text}; FP8, int4 and MXFP4 are kept so on the CPU and on GPUs of compute "
        f"capability 9.0, all else is decoded to {folder.dtype} (or the dtype asked for) while "
        "loaded"
    )
    if quantization.quantizes_activations:
        text += (
            "; activations of prompts are quantised to FP8 as well, as it says, on GPUs of compute "
            "capability 9.0 (activation_format)"
        )
    elif quantization.has_activations:
        text += "; activations are not quantised"
    return [("quantised", text)]


def _describe_sampling(folder: ModelFolder) -> str:
    defaults = folder.generation
    if defaults.temperature == 0.0:
        return f"greedy, {defaults.max_new_tokens} new tokens"
    return (
        f"temperature {defaults.temperature:g}, top_k {defaults.top_k}, "
        f"top_p {defaults.top_p:g}, {defaults.max_new_tokens} new tokens"
    )


def _num_elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
