"""ATTENTION: the kernel that scaled_dot_product_attention is pointed at, on machines not here."""

import sys
from types import SimpleNamespace

import pytest
import torch

import train_gpt as tg


@pytest.fixture
def machine(monkeypatch):
    """A CUDA machine as PyTorch would describe it: compute capability, packages that are there."""
    activated = []

    def make(capability=9, packages=(), attention="auto", dtype=torch.bfloat16, **model):
        def activate(name):
            if name.lower() not in packages:
                raise ModuleNotFoundError(f"No module named '{name}'")
            activated.append(name)

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
        monkeypatch.setattr(torch.backends.cuda, "enable_flash_sdp", activated.append)
        monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
        settings = {name.upper(): str(value) for name, value in model.items()}
        hp = tg.load_settings({"ATTENTION": attention, **settings}, check_places=False)
        return SimpleNamespace(hp=hp, device=torch.device("cuda", 0), dtype=dtype)

    make.activated = activated
    return make


@pytest.mark.parametrize(
    ("capability", "packages", "chosen", "activated"),
    [
        (9, ["fa3", "fa4"], "fa3", ["FA3"]),
        (9, ["fa4"], "fa4", ["FA4"]),
        (9, [], "cudnn", [False]),
        (10, ["fa3", "fa4"], "fa4", ["FA4"]),
        (10, [], "cudnn", [False]),
        (8, ["fa3", "fa4"], "fa2", []),
    ],
)
def test_auto_takes_the_first_that_is_there(machine, capability, packages, chosen, activated):
    assert tg.choose_attention(machine(capability, packages)) == chosen
    assert machine.activated == activated


def test_auto_falls_back_in_fp32_and_for_wide_heads(machine):
    assert tg.choose_attention(machine(dtype=torch.float32)) == "sdpa"
    wide = machine(packages=["fa3"], model_dim=1024, num_heads=4, num_kv_heads=4)
    assert tg.choose_attention(wide) == "sdpa"


@pytest.mark.parametrize("name", ["sdpa", "cudnn", "fa2", "fa3", "fa4"])
def test_a_named_kernel_is_taken(machine, name):
    assert tg.choose_attention(machine(packages=["fa3", "fa4"], attention=name)) == name


@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_a_named_kernel_that_is_missing_is_an_error(machine, name):
    with pytest.raises(tg.UserError, match=f"ATTENTION={name}: No module named"):
        tg.choose_attention(machine(attention=name))


@pytest.mark.parametrize("name", ["cudnn", "fa2", "fa3", "fa4"])
def test_a_cpu_has_none_of_them(name):
    environ = {"DEVICE": "cpu", "ATTENTION": name, "DTYPE": "bf16"}
    run = tg.Run(tg.load_settings(environ, check_places=False))
    with pytest.raises(tg.UserError, match=f"ATTENTION={name}: needs DEVICE=cuda and DTYPE=bf16"):
        tg.choose_attention(run)


def test_a_cpu_uses_what_pytorch_has_without_the_folder_of_the_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "amx_attention", None)
    run = tg.Run(tg.load_settings({"DEVICE": "cpu", "DTYPE": "bf16"}, check_places=False))
    assert tg.choose_attention(run) == "sdpa"
