"""What cells received, and the many ways in which that is written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from hypothesis import strategies as st

DELIMITERS = ["+", "_", "|", "-", ";", " & ", "::", ",", "/"]
CONTROL = ["control", "non-targeting", "NT_1"]
"""Control labels; some contain a delimiter."""
_LETTERS = st.characters(codec="utf-8", categories=["L", "N"])

names = st.text(_LETTERS, min_size=1, max_size=6).filter(lambda name: name not in CONTROL)
doses = st.one_of(
    st.just(1.0),
    st.floats(0.0009765625, 1e6, width=32).map(float),
    st.integers(1, 1000).map(float),
)
Received = list[dict[str, float]]


@st.composite
def screens(draw: st.DrawFn, max_cells: int = 12) -> Received:
    """What each cell received: at least one nothing, at least one something."""
    vocabulary = draw(st.lists(names, min_size=1, max_size=5, unique=True))
    combinations = st.dictionaries(st.sampled_from(vocabulary), doses, max_size=3)
    cells = draw(st.lists(combinations, max_size=max_cells))
    cells += [{}, {vocabulary[0]: draw(doses)}]
    return draw(st.permutations(cells))


@dataclass(frozen=True)
class Written:
    """A screen as labels and doses."""

    labels: pd.Series
    doses: pd.Series
    delimiter: str


@st.composite
def spellings(draw: st.DrawFn, received: Received) -> Written:
    """Write a screen down: any order, delimiter, blanks, controls in between, and coding."""
    delimiter = draw(st.sampled_from(DELIMITERS))
    labels, amounts = [], []
    for cell in received:
        parts = draw(st.permutations(list(cell)))
        if not parts or draw(st.booleans()):
            place = draw(st.integers(0, len(parts)))
            parts = [*parts[:place], draw(st.sampled_from(CONTROL)), *parts[place:]]
        blanks = st.sampled_from(["", " "])
        spelled = [draw(blanks) + name + draw(blanks) for name in parts]
        labels.append(delimiter.join(spelled))
        numbers = [repr(cell.get(name, draw(doses))) for name in parts]
        amounts.append(delimiter.join(numbers))
    index = [f"c{i}" for i in range(len(labels))]
    codings = {"object": labels, "category": pd.Categorical(labels), "string": labels}
    coding = draw(st.sampled_from(sorted(codings)))
    return Written(
        pd.Series(codings[coding], index=index, dtype=coding),
        pd.Series(amounts, index=index, dtype=draw(st.sampled_from(["object", "category"]))),
        delimiter,
    )


def decoded(codes: np.ndarray, amounts: np.ndarray, vocabulary: tuple[str, ...]) -> Received:
    """What the codes and doses of every cell say."""
    return [
        {vocabulary[code]: float(dose) for code, dose in zip(row, given, strict=True) if code >= 0}
        for row, given in zip(codes.tolist(), amounts.tolist(), strict=True)
    ]


def as_kept(received: Received) -> Received:
    """Doses in single precision."""
    return [{name: float(np.float32(dose)) for name, dose in cell.items()} for cell in received]
