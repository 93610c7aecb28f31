"""Sixteen-bit forms round as the types that they are named after."""

import numpy as np
import pytest

from src.parallel.compression import COMPRESSIONS


def test_float16_is_ieee_754_half_precision():
    values = np.array([0, -0.0, 1, 1 + 2 ** -11, 1 + 3 * 2 ** -11, 65504, 65519, 6e-8, 2e-8, np.inf, -np.inf], np.float32)
    coded = COMPRESSIONS["float16"].encode(values)
    assert coded.tolist() == values.astype(np.float16).view(np.uint16).tolist()
    assert COMPRESSIONS["float16"].decode(coded).tolist() == values.astype(np.float16).tolist()
    assert np.isinf(COMPRESSIONS["float16"].decode(COMPRESSIONS["float16"].encode(np.array([65520], np.float32)))).all()


@pytest.mark.parametrize("value, rounded", [
    (1.0, 1.0), (1 + 2 ** -8, 1.0), (1 + 3 * 2 ** -8, 1 + 2 ** -6), (1 + 2 ** -8 + 2 ** -20, 1 + 2 ** -7), (-3.1415927, -3.140625),
    (3e38, 3.00406e38), (1e-40, 9.1835e-41), (np.inf, np.inf), (-np.inf, -np.inf)])
def test_bfloat16_keeps_eight_digits_ties_to_even(value, rounded):
    form = COMPRESSIONS["bfloat16"]
    assert form.decode(form.encode(np.array([value], np.float32)))[0] == pytest.approx(rounded, rel=1e-4)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_what_is_not_finite_stays_so(name):
    form = COMPRESSIONS[name]
    assert not np.isfinite(form.decode(form.encode(np.array([np.nan, -np.nan, np.inf], np.float32)))).any()
