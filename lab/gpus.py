"""What the makers' data sheets say of GPUs."""

import re
from typing import NamedTuple


class Card(NamedTuple):
    """A kind of GPU."""

    peak: float  # bf16 products with sums in fp32, dense, FLOP/s
    memory: float  # GB


CARDS = {
    "H100": Card(989e12, 80),
    "H100PCIE": Card(756e12, 80),
    "H100NVL": Card(835e12, 94),
    "H200": Card(989e12, 141),
    "GH200": Card(989e12, 96),
    "H800": Card(989e12, 80),
    "B200": Card(2250e12, 180),
    "GB200": Card(2500e12, 186),
    "A100": Card(312e12, 80),
    "A800": Card(312e12, 80),
    "L40S": Card(362e12, 48),
    "L4": Card(121e12, 24),
    "A10G": Card(70e12, 24),
    "RTX4090": Card(165.2e12, 24),
    "RTX3090": Card(71e12, 24),
}
BESIDE = r"[\W_]|NVIDIA|GEFORCE|SXM\d|\d+GB|HBM\d\w?"  # what drivers write beside the kind


def kind_of(name: str) -> str:
    """Reduce a GPU's name, as a person or a driver writes it, to that in CARDS."""
    return re.sub(BESIDE, "", name.upper())
