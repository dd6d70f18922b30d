"""The peak speeds of cards, found by the names that torch gives them."""

import pytest

from seqlen_curriculum.config.cards import PEAK_TFLOPS, peak_flops

NAMED = [
    ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
    ("NVIDIA A100 80GB PCIe", "fp32", 19.5e12),
    ("NVIDIA H100 80GB HBM3", "fp16", 989.4e12),
    ("NVIDIA H100 PCIe", "bf16", 756e12),
    ("NVIDIA H100 NVL", "bf16", 835.5e12),
    ("NVIDIA H200", "bf16", 989.4e12),
    ("NVIDIA L40S", "bf16", 362e12),
    ("NVIDIA L4", "bf16", 121e12),
    ("Tesla V100-SXM2-32GB", "fp16", 125e12),
    ("Tesla V100-PCIE-16GB", "fp16", 112e12),
    ("Tesla V100-SXM2-32GB", "bf16", None),
    ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
    ("AMD Instinct MI300X", "bf16", 1307.4e12),
    ("NVIDIA A10G", "bf16", None),  # no A10
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
    ("NVIDIA A100-SXM4-80GB", "tf32", None),
    ("cpu", "fp32", None),
    ("", "bf16", None),
]


@pytest.mark.parametrize(("card", "precision", "flops"), NAMED)
def test_a_card_is_known_by_its_name(card, precision, flops):
    assert peak_flops(card, precision) == (None if flops is None else pytest.approx(flops))


def test_no_entry_is_hidden_by_one_before_it():
    assert {name: peak_flops(name, "fp16") for name in PEAK_TFLOPS} == {
        name: pytest.approx(peaks["fp16"] * 1e12) for name, peaks in PEAK_TFLOPS.items()
    }
