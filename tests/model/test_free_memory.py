"""Free memory of the system and of its cgroup, and the error for a model that does not fit."""

import pytest
import torch

import nanohybrid
from nanohybrid.checkpoint import load, save
from nanohybrid.cli.main import main
from nanohybrid.engine.random_weights import random_model
from nanohybrid.errors import InputError
from nanohybrid.estimate import Footprint, free_memory
from nanohybrid.model import HybridLM


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Empty stand-ins for /proc/meminfo and the cgroup directory."""
    (tmp_path / "cgroup").mkdir()
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path / "cgroup")
    return tmp_path


def test_free_bytes_is_the_smaller_of_system_and_cgroup(system):
    meminfo, group = system / "meminfo", system / "cgroup"
    assert free_memory.free_bytes() is None
    meminfo.write_text("MemTotal:       100 kB\nMemAvailable:    40 kB\n")
    assert free_memory.free_bytes() == 40_960
    (group / "memory.current").write_text("1000\n")
    (group / "memory.max").write_text("max\n")
    assert free_memory.free_bytes() == 40_960
    (group / "memory.max").write_text("5000\n")
    assert free_memory.free_bytes() == 4000
    (group / "memory.stat").write_text(
        "anon 300\ninactive_file 500\nactive_file 200\n"
    )  # the page cache, which can be dropped
    assert free_memory.free_bytes() == 4700


def test_model_larger_than_free_memory_is_refused_before_weights_are_read(system, tmp_path, capsys):
    config = nanohybrid.preset("tiny")
    save(HybridLM(config, seed=0), tmp_path / "model")
    sizes = {dtype: Footprint.of(config, dtype).weight_bytes for dtype in (torch.float32, torch.bfloat16)}
    int4 = Footprint.of(config, torch.bfloat16, format="int4").weight_bytes
    assert int4 < sizes[torch.bfloat16] - 40_000

    def free(number):
        (system / "meminfo").write_text(f"MemAvailable: {number // 1024 + 1} kB\nSwapFree: 0 kB\n")

    free(sizes[torch.float32])
    assert load(tmp_path / "model").dtype == torch.float32
    free(sizes[torch.bfloat16])
    with pytest.raises(
        InputError, match=r"GiB, and .* GiB of memory are free; it fits as bf16 .*, int4 .* GiB"
    ):
        load(tmp_path / "model")
    assert load(tmp_path / "model", torch.bfloat16).dtype == torch.bfloat16
    free(int4 + 2048)
    for make in (
        lambda **how: load(tmp_path / "model", torch.bfloat16, **how),
        lambda **how: random_model(config, torch.bfloat16, **how),
    ):
        with pytest.raises(InputError, match=r"it fits as int4 .* GiB"):
            make()
        make(quantize="int4")
    free(1024)
    assert main(["generate", str(tmp_path / "model"), "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert "it fits in no format" in error and len(error.splitlines()) == 1
    load(tmp_path / "model", device="meta")  # takes none


def test_check_memory_counts_free_swap(system):
    (system / "meminfo").write_text("MemAvailable: 1 kB\nSwapFree: 100000 kB\n")
    assert random_model(nanohybrid.preset("tiny"), torch.bfloat16) is not None
