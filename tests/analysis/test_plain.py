"""Dataclasses come back from JSON as they were, and what does not fit is named."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Literal

import pytest

from simqat_jax.analysis.plain import plain, restored


@dataclasses.dataclass(frozen=True)
class Inner:
    end: tuple[float, float]
    word: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    many: tuple[Inner, ...]
    named: Mapping[str, int]
    maybe: Inner | None = None
    flag: bool = False
    left_out: object = dataclasses.field(default=None, compare=False)


INNER = Inner((-math.inf, math.inf), "b")
GIVEN = Outer(INNER, (Inner((0.5, 2)), INNER), {"x": 3}, INNER, True)


def test_they_come_back():
    for given in (GIVEN, dataclasses.replace(GIVEN, many=(), maybe=None)):
        assert restored(Outer, json.loads(json.dumps(plain(given), allow_nan=False)), "it") == given
    assert "left_out" not in plain(dataclasses.replace(GIVEN, left_out=object()))
    assert restored(Inner, {"end": [1, "Infinity"]}, "it") == Inner((1.0, math.inf))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner": 3}, r"it.inner must be an object, got 3"),
        ({"inner": {"end": [1]}}, r"it.inner.end must be a list of 2, got \[1\]"),
        ({"inner": {"end": [1, "x"]}}, r"it.inner.end\[1\] must be a number, got 'x'"),
        ({"inner": {"end": [1, True]}}, r"it.inner.end\[1\] must be a number, got True"),
        ({"inner": {"word": "a"}}, "it.inner must be an object with end"),
        ({"inner": {"end": [1, 2], "word": "c"}}, "it.inner.word must be one of"),
        ({"many": {}}, "it.many must be a list"),
        ({"named": {"x": 1.5}}, r"it.named\['x'\] must be int, got 1.5"),
        ({"flag": 1}, "it.flag must be bool, got 1"),
        ({"maybe": []}, "it.maybe must be an object"),
        ({"strange": 1}, "it must be an object of inner, many, .*got 'strange'"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        restored(Outer, plain(GIVEN) | changes, "it")
