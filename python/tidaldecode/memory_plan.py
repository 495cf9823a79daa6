"""MemoryPlan: what a decoder takes of its device, by purpose, before anything is loaded.

The engine plans (cpp/src/decode/memory_plan.cc) and then allocates exactly that; here it is shown.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from tidaldecode import _core
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.config import DecodeConfig
from tidaldecode.engine_config import core_config, core_model, core_weights
from tidaldecode.plans import choose_plan


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of a decoder's memory. print() shows them as a table.

    Attributes:
        device: "cpu", "cuda:0".
        max_seq_len, max_batch_size: what the plan is for, every automatic value filled in.
        weight_bytes: the model's weights.
        kv_bytes: the KV cache: num_pages pages of page_size tokens.
        scratch: what passes and steps work in, by purpose.
        reserve_bytes: left to a GPU for recorded steps and the code of kernels; an estimate.
        host_bytes: pinned host memory that copies to a GPU pass through, most of it while loading.
        device_bytes, free_bytes: of the device, before the decoder took any.
        usable_bytes: what the decoder may take, by gpu_memory_utilization.
        problem: why the plan does not fit, and which setting changes that; empty if it fits.
    """

    device: str
    max_seq_len: int
    max_batch_size: int
    weight_bytes: int
    kv_bytes: int
    num_pages: int
    page_size: int
    scratch: dict[str, int]
    reserve_bytes: int
    host_bytes: int
    device_bytes: int
    free_bytes: int
    usable_bytes: int
    problem: str = ""

    @property
    def scratch_bytes(self) -> int:
        """All of the scratch."""
        return sum(self.scratch.values())

    @property
    def total_bytes(self) -> int:
        """All that is taken of the device."""
        return self.weight_bytes + self.kv_bytes + self.scratch_bytes + self.reserve_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens that the KV cache holds, of all sequences together."""
        return self.num_pages * self.page_size

    def rows(self) -> list[tuple[str, str]]:
        """Label and value, line by line."""
        cache = f"{self.num_tokens:,} tokens, {self.num_pages:,} pages of {self.page_size}"
        lines = [
            ("weights", show_bytes(self.weight_bytes)),
            ("KV cache", f"{show_bytes(self.kv_bytes)}  ({cache})"),
        ]
        lines += [(purpose, show_bytes(size)) for purpose, size in self.scratch.items()]
        if self.reserve_bytes:
            estimate = f"{show_bytes(self.reserve_bytes)}  (recorded steps, code; estimated)"
            lines.append(("the device's own", estimate))
        available = (
            f"of {show_bytes(self.usable_bytes)} usable; {show_bytes(self.free_bytes)} of "
            f"{show_bytes(self.device_bytes)} are free"
        )
        lines.append(("total", f"{show_bytes(self.total_bytes)}  ({available})"))
        if self.host_bytes:
            lines.append(("host, pinned", show_bytes(self.host_bytes)))
        return lines

    def title(self) -> str:
        """What the plan is for."""
        return (
            f"Memory on {self.device}, max_seq_len {self.max_seq_len:,}, "
            f"max_batch_size {self.max_batch_size}"
        )

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        lines = [self.title(), *(f"  {label:{width}}  {value}" for label, value in self.rows())]
        if self.problem:
            lines.append(f"It does not fit. {self.problem}")
        return "\n".join(lines)


def plan_memory(model_dir: str | os.PathLike[str], **options: Any) -> MemoryPlan:
    """The memory that Decoder(model_dir, **options) would take. Loads and allocates nothing.

    Args:
        model_dir: a model folder; with load_format="dummy" its config.json is enough.
        options: the fields of DecodeConfig.

    Raises: ConfigError, InvalidArgument, WeightsError, UnsupportedError and BackendError, as
        Decoder does. A plan that does not fit is returned, with a `problem`.
    """
    settings = DecodeConfig(**options)
    folder = read_model_folder(model_dir, settings.load_format, settings.max_seq_len)
    plan = choose_plan(settings, settings.attention, folder)
    config = core_config(settings, plan, folder)
    return MemoryPlan(**_core.plan_memory(core_model(folder.model), config, core_weights(folder)))


def show_bytes(count: int) -> str:
    """A size to read: "14.96 GiB", "3.2 MiB", "12.0 KiB"."""
    if count >= 1024**3:
        return f"{count / 1024**3:.2f} GiB"
    if count >= 1024**2:
        return f"{count / 1024**2:.1f} MiB"
    return f"{count / 1024:.1f} KiB"
