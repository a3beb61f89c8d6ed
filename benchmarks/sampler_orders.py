"""Claimed and measured order of every sampler, by the functions of its test.

    python -m benchmarks.sampler_orders

Deterministic samplers: the error of the end of one trajectory, of a mixture of two normals.
Stochastic ones: the error of the variance that is drawn, of a normal, without Monte Carlo.
On equal steps PLMS' claim is a lower bound: its first steps, of lower order, are taken at large
sigma, where the path is nearly straight, and with more steps the measure goes on to its weights' 4.
"""

import pytest

from benchmarks.record import keep
from tests.diffusion import test_convergence as measured

COUNTS = {"strong": [48, 96, 192], "weak": [32, 64, 128, 256]}


def main():
    results = {}
    for label, claim in measured.DETERMINISTIC.items():
        order, errors = measured.order_of(
            measured.sampler_of(label), measured.geometric, COUNTS["strong"]
        )
        results[label] = row("strong", claim, order, errors)
    order, errors = measured.order_of(measured.SAMPLERS["plms"], measured.equal, COUNTS["strong"])
    results["plms, equal steps"] = row("strong", 3, order, errors)
    for label, (claim, *_) in measured.WEAK.items():
        with pytest.MonkeyPatch.context() as monkeypatch:
            order, errors = measured.weak_order_of(monkeypatch, label, COUNTS["weak"])
        results[label] = row("weak", claim, order, errors)
    print("| sampler | kind | claimed | measured | error at most steps |\n|---|---|---|---|---|")
    for label, r in results.items():
        print(
            f"| {label} | {r['kind']} | {r['claimed']} | {r['measured']} | {r['errors'][-1]:.1e} |"
        )
    print(keep("sampler_orders", results, {"steps": COUNTS, "precision": "float64"}))


def row(kind, claim, order, errors):
    errors = [float(f"{e:.3e}") for e in errors]
    return {"kind": kind, "claimed": claim, "measured": round(float(order), 2), "errors": errors}


if __name__ == "__main__":
    main()
