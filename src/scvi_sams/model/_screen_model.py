"""A model and its screen: registration, training, saving, and provenance."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pandas as pd
from anndata import AnnData
from scvi.model.base import BaseModelClass, UnsupervisedTrainingMixin

from scvi_sams._compat import SETUP_ARGUMENTS_KEY
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams._torch import check_single_precision
from scvi_sams.counts._validation import unchanged_on_error
from scvi_sams.data._contexts import ContextField
from scvi_sams.data._field import PerturbationField
from scvi_sams.data._manager import ADATA_LOCK
from scvi_sams.features._table import FeatureTable
from scvi_sams.labels._presets import CONTROL, DELIMITER, PERTURBATION_KEY
from scvi_sams.labels._spelling import Control, Spelling
from scvi_sams.model._context_tests import warn_of_contexts
from scvi_sams.model._doses import largest_doses
from scvi_sams.model._features import features_of_model
from scvi_sams.model._init_arguments import check_known_arguments
from scvi_sams.model._read_values import ReadValues
from scvi_sams.model._record import keep_record, model_card, model_record, training_record
from scvi_sams.model._registration import (
    check_registered,
    check_setup,
    data_to_read,
    learned_state,
    register,
    release_other_data,
    sizes_for_module,
)
from scvi_sams.model._saving import load_whole, save_whole
from scvi_sams.model._summary import headline, summary_table
from scvi_sams.model._training import training_arguments
from scvi_sams.module._perturbation_module import PerturbationModule
from scvi_sams.module._settings import given
from scvi_sams.train._interruption import weights_kept_on_error
from scvi_sams.train._notices import without_notices
from scvi_sams.train._plan import PerturbationTrainingPlan

if TYPE_CHECKING:
    from lightning import LightningDataModule


class ScreenModel(UnsupervisedTrainingMixin, BaseModelClass):
    """A model that is registered with a screen, trained on it, saved and described.

    Invalid arguments raise an ``InvalidArgumentError``.
    """

    _module_cls: ClassVar[type[PerturbationModule]]
    _training_plan_cls = PerturbationTrainingPlan
    # Whether a combination is the sum of its perturbations, or a separate perturbation; whether
    # effects may differ between contexts; and whether features predict unmeasured perturbations.
    _additive: ClassVar[bool] = False
    _has_contexts: ClassVar[bool] = False
    _takes_features: ClassVar[bool] = False
    module: PerturbationModule
    unmeasured: Sequence[str] = ()
    """Names of perturbations without cells that can be predicted from their features."""
    # scvi-tools saves attributes whose names end with an underscore.
    trainings_: tuple[dict[str, Any], ...] = ()
    largest_doses_: np.ndarray | None = None  # of each perturbation in training cells; 0 for none

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make a model, if the settings exist."""
        check_known_arguments(cls, args, kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        adata: AnnData | None,
        *,
        gene_likelihood: str,
        registry: dict[str, Any] | None = None,
        perturbation_features: FeatureTable | None = None,
        **module_kwargs: Any,
    ) -> None:
        self._module_cls.check_settings(gene_likelihood=gene_likelihood, **module_kwargs)
        check_registered(type(self), adata, registry)
        check_single_precision()
        super().__init__(adata, registry)
        self.gene_likelihood = gene_likelihood
        self._values = ReadValues(self._setup_arguments, gene_likelihood)
        if adata is not None:
            self._values.validate_once(self.adata_manager)
            self._values.check_unchanged(self.adata_manager)
        if perturbation_features is not None:
            names, genes = self.perturbations, self.get_var_names()
            found = features_of_model(perturbation_features, names, self._spelling, genes)
            self.unmeasured, module_kwargs = found.unmeasured, module_kwargs | found.for_module
        self.module = self._module_cls(
            **sizes_for_module(self.registry_, self.summary_stats),
            gene_likelihood=gene_likelihood,
            **module_kwargs,
        )
        self._model_summary_string = headline(self)

    @property
    def perturbations(self) -> list[str]:
        """Names of the perturbations, in the order of the rows of masks and effects."""
        vocabulary = self._state(REGISTRY_KEYS.PERTURBATIONS)[PerturbationField.VOCABULARY_KEY]
        return [str(name) for name in vocabulary]

    @property
    def contexts(self) -> list[str]:
        """Names of the contexts (``context_key``), sorted; empty if none are registered."""
        levels = self._state(REGISTRY_KEYS.CONTEXTS).get(ContextField.LEVELS_KEY, ())
        return [str(name) for name in levels]

    def _state(self, key: str) -> dict[str, Any]:
        """State of a field from registration; empty if it was not registered."""
        return learned_state(self.registry_, key)

    @property
    def _setup_arguments(self) -> dict[str, Any]:
        return self.registry_[SETUP_ARGUMENTS_KEY]

    @property
    def _spelling(self) -> Spelling:
        """Spelling of the labels of the screen."""
        return Spelling.of(self._setup_arguments["control"], self._setup_arguments["delimiter"])

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        perturbation_key: str | None = PERTURBATION_KEY,
        control: Control = CONTROL,
        *,
        delimiter: str | None = DELIMITER,
        dosage_key: str | None = None,
        dosage_obsm_key: str | None = None,
        perturbation_names: Sequence[str] | str | None = None,
        layer: str | None = None,
        batch_key: str | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        continuous_covariate_keys: Sequence[str] | None = None,
        size_factor_key: str | None = None,
        guide_key: str | None = None,
        context_key: str | None = None,
        preset: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Register a screen.

        Parameters
        ----------
        adata
            Cells x genes. Only slots that begin with ``_scvi`` are written.
        perturbation_key
            Column of obs with the perturbations of each cell, such as ``"KLF1"`` or
            ``"KLF1+MAP2K6"``, in any order.
        control
            Label, or labels, of control cells, which are ignored inside a combination; in
            ``"NT*"``, ``*`` matches any text without the delimiter. Or what marks these cells: the
            name of a boolean column of obs, or a boolean for each cell.
        delimiter
            Separator between the names of a combination; ``None`` to never split labels.
        dosage_key
            Column of obs with the dose of each cell: a number, or text such as ``"0.5+1.0"``
            aligned with the label as written; otherwise 1. Effects are linear in the dose, so use a
            scale on which that is plausible (often the logarithm).
        dosage_obsm_key
            Instead of labels: key of obsm with a cells x perturbations matrix of doses. A row of
            zeros is a control cell.
        perturbation_names
            Names of the columns of that matrix, or a key of uns. A DataFrame has its own names.
        layer
            Layer with raw counts; ``None`` for ``X``.
        batch_key, categorical_covariate_keys, continuous_covariate_keys
            Columns of obs that encoder and decoder condition on.
        size_factor_key
            Column of obs with a size factor, such as the library size of the whole transcriptome if
            ``adata`` is a panel of genes (a warning names it); otherwise the sum of the counts.
        guide_key
            Column of obs with the guide of each cell, or several (``"STAT1g1|STAT1g2"``), or NaN.
            Each belongs to one perturbation; control cells have others (:doc:`more </anndata>`).
        context_key
            Column of obs: cell type, donor or line. The effect of a perturbation is then a shared
            effect plus a sparse context-specific one, if its cells support one.
        preset
            Name of a convention (:doc:`table of them </anndata>`), such as ``"gears"``, that sets
            ``perturbation_key``, ``control`` and ``delimiter`` unless they are passed.
        **kwargs
            ``source_registry`` and others that scvi-tools passes when it loads a model.

        Raises
        ------
        MissingKeyError
            If a named column, layer or matrix does not exist.
        MissingControlError
            If no cell is a control cell.
        InvalidPerturbationLabelError, InvalidDosageError
            If labels or doses are missing or malformed, or a guide has no or several perturbations.
        InvalidCovariateError
            If a batch, covariate or context is missing or invalid.
        RegistrationError
            If ``adata`` is a view, empty or has two genes of a name; it is unchanged by errors.

        Examples
        --------
        >>> adata = scvi_sams.datasets.simulate_screen(n_genes=50)
        >>> adata.layers["counts"] = adata.X.copy()
        >>> scvi_sams.SAMSVAE.setup_anndata(adata, "perturbation", "control", layer="counts")
        """
        check_setup(kwargs, layer=layer, batch_key=batch_key, size_factor_key=size_factor_key)
        arguments = cls._get_setup_method_args(**locals())
        cls.register_manager(register(adata, arguments, cls._additive, cls._has_contexts, **kwargs))

    def _validate_anndata(self, adata: AnnData | None = None, copy_if_view: bool = True) -> AnnData:
        """Register other data by name if necessary, and check that values are unchanged."""
        target = data_to_read(self, adata)
        with ADATA_LOCK, unchanged_on_error(target):
            validated = super()._validate_anndata(target, copy_if_view=copy_if_view)
            self._values.validate_once(self.get_anndata_manager(validated, required=True))
            release_other_data(self._per_instance_manager_store[self.id], self.adata_manager)
        return validated

    def train(
        self,
        max_epochs: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        load_sparse_tensor: bool = False,
        batch_size: int = 512,
        early_stopping: bool = False,
        datasplitter_kwargs: dict[str, Any] | None = None,
        plan_config: Any = None,
        plan_kwargs: dict[str, Any] | None = None,
        datamodule: LightningDataModule | None = None,
        trainer_config: Any = None,
        data_on_device: bool = False,
        checkpoint_path: str | os.PathLike[str] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model; arguments are those of scvi-tools, with defaults measured for this one.

        If the expression is on disk (:func:`~scvi_sams.data.open_screen`), mini-batches are
        streamed from there, shuffled in blocks.

        Ctrl-C ends training like early stopping; a second one immediately, with the weights before
        (for loops of trainings see :func:`~scvi_sams.train.interrupts_raise`).

        Parameters
        ----------
        max_epochs
            Passes over the training cells. ``None``: validation cells decide when each phase ends
            (:doc:`details </settings>`, also for ``None`` without such cells or with a plan).
        accelerator, devices
            Hardware, as in Lightning.
        train_size
            Fraction of training cells; ``None`` means 0.9.
        validation_size
            Fraction of validation cells; ``None``: all others. The remainder is the test set.
        shuffle_set_split
            Split at random within each label; the seed is ``scvi.settings.seed`` (0 if unset).
        load_sparse_tensor
            Move sparse mini-batches to the device and make them dense there.
        batch_size
            Cells per step.
        early_stopping
            Stop when ``elbo_validation`` no longer decreases (scored with the same random numbers
            in each epoch). Off by default, because validation cells decide anyway. It does not end
            the dense phase (``dense_fraction``); scores count after it.
        datasplitter_kwargs
            Arguments of :class:`~scvi.dataloaders.DataSplitter` or
            :class:`~scvi_sams.data.StreamingDataModule`; ``external_indexing`` (positions or
            booleans of training, validation and test cells) replaces the split.
        plan_config, plan_kwargs
            Arguments of :class:`~scvi_sams.train.PerturbationTrainingPlan`, such as ``lr``.
        datamodule
            Data module instead of the default one, such as a
            :class:`~scvi_sams.data.StreamingDataModule`, with the attributes ``adata_manager`` and
            ``train_idx``; it sets split and ``batch_size``.
        data_on_device
            Copy all cells to the device once and extract mini-batches there
            (:class:`~scvi_sams.data.ResidentDataModule`), for GPUs with enough memory.
        checkpoint_path
            File to which the state of training is written after each epoch, and which is removed at
            the end. If it exists, training resumes from it: run the same script again after it was
            killed. Other data or arguments raise an error.
        trainer_config, **trainer_kwargs
            Arguments of :class:`~scvi.train.Trainer`. ``gradient_clip_val`` is 100 by default
            (paper). The logger of ``history`` comes before your loggers.

        Raises
        ------
        InvalidSplitError
            If the split has no training cells, or contains a cell twice or an invalid position.
        TrainingDivergedError
            If a term of the objective becomes infinite or NaN. The weights are then those at the
            end of the last good epoch (in a first training, of an epoch after the dense phase;
            otherwise those before it), and the model counts as trained only if it was before.
            After any other error they are those before training.
        UnreadableDataError
            If expression on disk, or the file at ``checkpoint_path``, is damaged.

        Examples
        --------
        >>> scvi_sams.SAMSVAE.setup_anndata(adata)
        >>> longer = scvi_sams.SAMSVAE(adata, n_latent=6, n_hidden=16)
        >>> longer.train(max_epochs=4, plan_kwargs={"lr": 1e-3}, enable_progress_bar=False)
        >>> longer.history["dense_phase"].squeeze().tolist()  # all masks on, at first
        [1.0, 1.0, 0.0, 0.0]
        """
        arguments = given(locals())
        arguments |= arguments.pop("trainer_kwargs")
        self._values.check_unchanged(self.adata_manager)
        arguments = training_arguments(self, arguments)
        with weights_kept_on_error(self.module), without_notices():
            super().train(**arguments)
        self.trainings_ = (*self.trainings_, training_record(self, arguments))
        self.largest_doses_ = largest_doses(self, arguments["datamodule"])
        counts = self.module.likelihood.is_count_likelihood
        warn_of_contexts(self.adata_manager, counts=counts)

    def save(
        self,
        dir_path: str | os.PathLike[str],
        prefix: str | None = None,
        overwrite: bool = False,
        save_anndata: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the model in a folder; files appear there only once they are complete.

        Parameters
        ----------
        dir_path
            Folder to create.
        prefix
            Prefix of the names of the files.
        overwrite
            Whether to replace files of an earlier save.
        save_anndata
            Whether to save the training data too. If not, data of another model from an earlier
            save in the folder are removed when it is overwritten.
        **kwargs
            ``compression`` and ``compression_opts`` of the data, ``save_kwargs`` of ``torch.save``.

        Raises
        ------
        SavingError
            If the folder exists and ``overwrite`` is false, nothing can be written there, or an
            h5ad file cannot store the data. Existing files are then unchanged.
        InvalidCountsError, ChangedDataError
            If the data to save have changed since the model was made.
        """
        if save_anndata and self.adata is not None:
            self._validate_anndata()
        save_whole(self, super().save, dir_path, overwrite, save_anndata, prefix=prefix, **kwargs)

    @classmethod
    def load(
        cls,
        dir_path: str | os.PathLike[str],
        adata: AnnData | bool | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Load a model from the folder that :meth:`save` wrote.

        Loading a model executes code in the file, because scvi-tools uses pickle: load only models
        from people whom you trust.

        Parameters
        ----------
        dir_path
            That folder.
        adata
            Cells with the genes of the training data, which need not be registered; ``None``: those
            saved with the model, ``False``: none.
        *args, **kwargs
            See :meth:`scvi.model.base.BaseModelClass.load`, such as ``accelerator`` and ``prefix``.

        Raises
        ------
        UnreadableDataError
            If there is no saved model in the folder, it is damaged, or of another class.
        SAMSError
            If ``adata`` does not fit the model.
        """
        return load_whole(cls, super().load, dir_path, adata, *args, **kwargs)

    @property
    def provenance(self) -> dict[str, Any]:
        """Provenance of the model, as plain strings, numbers, booleans, lists and dicts.

        ``"model"``: its class. ``"settings"``: the arguments that it was made with. ``"setup"``:
        those of ``setup_anndata``. ``"trainings"``: for each successful call of :meth:`train` the
        ``"settings"``, ``"n_training_cells"``, the ``"seed"`` (of ``scvi.settings``; ``None`` if
        unset), ``"n_epochs"``, the ``"ending"`` (why training ended) and the ``"versions"`` of
        packages. Saved with the model, and written with every result, as JSON, to
        ``uns["sams_provenance"]``.

        Examples
        --------
        >>> model.provenance["model"], model.provenance["settings"]["n_latent"]
        ('SAMSVAE', 6)
        >>> [training["seed"] for training in model.provenance["trainings"]]
        [0]
        """
        return model_record(self)

    def keep_provenance(self, adata: AnnData, key: str) -> None:
        """Write the provenance of the result ``key`` to ``uns["sams_provenance"]``, as JSON."""
        keep_record(adata, key, self.provenance)

    def summary(self) -> pd.DataFrame:
        """Tabulate the ``"screen"``, ``"model"``, ``"training"``, ``"masks"`` and ``"warnings"``.

        Examples
        --------
        >>> model.summary().loc[("screen", "control cells"), "value"]
        '200'
        """
        return summary_table(self)

    def card(self, *, description: str | None = None, license: str | None = None) -> str:
        """Describe the model in Markdown: data, settings, trainings, versions and limits.

        It begins with the metadata for Hugging Face: save it as ``README.md`` next to the model,
        for ``scvi.hub.HubModel``. The data are not required.

        Parameters
        ----------
        description
            Purpose and source of the model: screen, cells, reference. Only you know them.
        license
            License of the model, such as ``"cc-by-4.0"``.

        Examples
        --------
        >>> card = model.card(description="CRISPR screen of cells that do not exist.")
        >>> "860 cells" in card and "8 perturbations" in card
        True
        """
        self._check_if_trained(warn=True)
        return model_card(self, description, license)
