"""Every row of docs/bad_input.md happens, and nothing else is touched."""

import logging
import pickle
import warnings

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from bad_input.situation import (
    SIZES,
    TRAINED,
    TRAINING,
    Situation,
    elbo,
    full_screen,
    screen,
    state_of,
)
from bad_input.table import SECTIONS
from scvi_sams import SAMSVAE
from scvi_sams.exceptions import SAMSError, TrainingDivergedError

CASES = {f"{section}: {case.what}": case for section, cases in SECTIONS.items() for case in cases}


@pytest.fixture(scope="module")
def shared():
    adata = full_screen()
    SAMSVAE.setup_anndata(adata, **TRAINED)
    torch.manual_seed(0)
    model = SAMSVAE(adata, **SIZES)
    model.train(**TRAINING)
    return model


@pytest.fixture(scope="module")
def reference_elbo(tmp_path_factory):
    situation = Situation(screen(), None, np.nan, tmp_path_factory.mktemp("reference"))
    return elbo(situation.train())


@pytest.fixture
def messages():
    """What is logged and warned of."""
    found = []

    class Records(logging.Handler):
        def emit(self, record):
            found.append(record.getMessage())

    logger, handler = logging.getLogger("scvi.sams"), Records(logging.WARNING)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [*found, *(str(warning.message) for warning in caught)]
    logger.removeHandler(handler)
    logger.setLevel(level)


def content(adata: AnnData, *, with_registration: bool) -> dict[str, bytes]:
    """Everything in an AnnData, for comparison."""
    parts = {"X": adata.X, "obs": adata.obs.copy(), "var": adata.var.copy()}
    for slot in ("layers", "obsm", "varm", "uns"):
        parts |= {f"{slot}[{key!r}]": value for key, value in getattr(adata, slot).items()}
    if not with_registration:
        parts = {name: value for name, value in parts.items() if "['_scvi" not in name}
        kept = [key for key in parts["obs"] if not str(key).startswith("_scvi")]
        parts["obs"] = parts["obs"].loc[:, kept] if parts["obs"].columns.is_unique else parts["obs"]
    return {name: pickled(value) for name, value in parts.items()}


def pickled(value):
    if sparse.issparse(value):
        value = (type(value), value.shape, value.data, value.indices, value.indptr)
    elif hasattr(value, "to_dict") and hasattr(value, "columns"):
        value = (list(value.index), list(value.columns), value.dtypes.astype(str).tolist())
        value = (*value, repr(value))
    elif isinstance(value, np.ndarray):
        value = np.asarray(value)
    return pickle.dumps(value)


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


def test_no_two_rows_are_called_the_same():
    assert len(CASES) == sum(map(len, SECTIONS.values()))


@pytest.mark.parametrize("name", CASES)
def test_row(name, shared, reference_elbo, tmp_path, messages):
    case = CASES[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*names are not unique")
        situation = Situation(case.data(), shared, reference_elbo, tmp_path)
    adata = situation.adata
    before = content(adata, with_registration=True)
    shared_before = state_of(shared), content(shared.adata, with_registration=True)
    if case.error is None:
        case.check(situation, case.act(situation))
    else:
        with pytest.raises(case.error) as raised:
            case.act(situation)
        assert isinstance(raised.value, SAMSError)
        for part in case.names:
            assert part in str(raised.value)
        assert_as_it_was(situation, before, diverged=case.error is TrainingDivergedError)
    if case.error is None:
        for part in case.names:
            assert any(part in message for message in messages()), messages()
    state, of_shared = shared_before
    assert all(torch.equal(value, state[key]) for key, value in state_of(shared).items())
    assert content(shared.adata, with_registration=True) == of_shared


def assert_as_it_was(situation, before, *, diverged):
    is_new = situation.is_registered
    after = content(situation.adata, with_registration=not is_new)
    assert after == {name: before[name] for name in before if not is_new or name in after}
    assert after.keys() == before.keys()
    if situation.built is not None:
        assert not situation.built.is_trained
        if not diverged:
            state = state_of(situation.built)
            assert all(torch.equal(state[key], situation.built_state[key]) for key in state)
    assert not [path for path in files(situation.folder) if "saving" in path.name]
