"""Table 2 of the paper again: the activation gains as integrals, beside the paper's averages.

Source: Sec. 2.3 of "On the Ideal Number of Groups for Isometric Gradient Propagation",
arXiv 2302.03193. The paper's symbols: F and B, the quantities "F" and "B", are the forward and the
backward activation gain of Definition 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tabulate import tabulate

from gnpractical.activation_gain import activation_gain

SIGMAS = (0.1, 1.0, 10.0)
TOLERANCE = 0.002  # This is two units of the last digit that the paper prints.

# The columns of Table 2.
_ACTIVATIONS = (
    *("ReLU", "PReLU", "GELU", "SiLU", "ELU", "SELU"),
    *("Sigmoid", "Tanh", "Softplus", "Softsign", "LogSigmoid"),
)
# Its rows, by sigma and quantity.
_TABLE_2: dict[tuple[float, str], tuple[float, ...]] = {
    (0.1, "F"): (0.500, 0.531, 0.255, 0.252, 0.928, 1.876, 25.079, 0.981, 48.438, 0.751, 48.495),
    (0.1, "B"): (0.500, 0.531, 0.256, 0.253, 0.929, 1.879, 0.062, 0.981, 0.251, 0.757, 0.251),
    (0.1, "B/F"): (1.000, 1.000, 1.006, 1.002, 1.001, 1.001, 0.002, 1.000, 0.005, 1.007, 0.005),
    (1.0, "F"): (0.500, 0.532, 0.425, 0.356, 0.645, 1.000, 0.293, 0.394, 0.921, 0.183, 0.921),
    (1.0, "B"): (0.500, 0.532, 0.456, 0.379, 0.668, 1.071, 0.045, 0.464, 0.293, 0.228, 0.293),
    (1.0, "B/F"): (1.000, 1.000, 1.072, 1.067, 1.036, 1.072, 0.153, 1.178, 0.318, 1.245, 0.319),
    (10.0, "F"): (0.500, 0.531, 0.500, 0.499, 0.504, 0.565, 0.005, 0.009, 0.501, 0.007, 0.501),
    (10.0, "B"): (0.500, 0.531, 0.506, 0.507, 0.520, 0.613, 0.007, 0.053, 0.461, 0.026, 0.461),
    (10.0, "B/F"): (1.000, 1.000, 1.011, 1.017, 1.032, 1.085, 1.434, 5.780, 0.920, 3.908, 0.921),
}


@dataclass(frozen=True)
class GainRow:
    """One entry of the paper's Table 2.

    Attributes:
        activation: PyTorch's name of the activation, such as ``"ReLU"``.
        sigma: The standard deviation of the input.
        quantity: ``"F"``, ``"B"`` or ``"B/F"``.
        integral: The exact value.
        paper: The paper's value, an average over 10^7 samples with three decimals.
    """

    activation: str
    sigma: float
    quantity: str
    integral: float
    paper: float

    @property
    def near_paper(self) -> bool:
        """Whether the integral is within two units of the paper's last digit."""
        return abs(self.integral - self.paper) <= TOLERANCE


def gain_table() -> list[GainRow]:
    """Compute the 99 entries of Table 2."""
    rows = []
    for sigma in SIGMAS:
        for column, activation in enumerate(_ACTIVATIONS):
            gain = activation_gain(activation.lower(), sigma)
            integrals = {"F": gain.forward, "B": gain.backward, "B/F": 1 / gain.ratio}
            for quantity, integral in integrals.items():
                paper = _TABLE_2[sigma, quantity][column]
                rows.append(GainRow(activation, sigma, quantity, integral, paper))
    return rows


def format_gains(rows: Iterable[GainRow]) -> str:
    """Write the rows as a table, with a star at each that is not near the paper's value.

    ::

        sigma  activation    gain      integral    paper    paper - integral
          0.1  ReLU          F         0.500000    0.500             +0.0000
          0.1  Sigmoid       F        25.062190   25.079             +0.0168  *
        * 1 of 2 paper values differ from the integral by more than 0.002.
    """
    rows = list(rows)
    table = [
        [
            *(r.sigma, r.activation, r.quantity, r.integral, r.paper),
            *(f"{r.paper - r.integral:+.4f}", "" if r.near_paper else "*"),
        ]
        for r in rows
    ]
    headers = ["sigma", "activation", "gain", "integral", "paper", "paper - integral", ""]
    text = tabulate(table, headers, floatfmt=("g", "", "", ".6f", ".3f", "", ""))
    return (
        f"{text}\n* {sum(not r.near_paper for r in rows)} of {len(rows)} paper values differ from "
        f"the integral by more than {TOLERANCE}."
    )
