"""A run: its manifest ``run.json`` is written once at the start, and compared when the run is resumed."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

from nnunet_flare.children import safe_environment
from nnunet_flare.documents import flat
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.recipes.load import recipe_from
from nnunet_flare.recipes.recipe import Recipe
from nnunet_flare.rounds.run.case_rows import case_rows
from nnunet_flare.rounds.run.home import check_home, owner_file, write_owner
from nnunet_flare.rounds.run.paths import RunPaths
from nnunet_flare.rounds.run.round import Base, Kind, Round
from nnunet_flare.rounds.run.settings import RunSettings
from nnunet_flare.trainers.settings import TRUST_VARIABLE

VERSION = 1
DATASET = re.compile(r"Dataset\d{3}_.+")
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
OPTIONAL = ("final_plans_name", "coarse_plans_name", "init_model", "init_map", "eval_images", "eval_labels")
MANIFEST = {
    "version": int,
    "settings": {
        **dict.fromkeys(("name", "dataset", "plans_name", "unlabelled_dir"), str),
        **{f"{key}?": (str, None) for key in OPTIONAL},
        "recipe": dict,
        "folders": dict.fromkeys(FOLDERS, str),
        "device": {"cuda", "cpu", "mps"},
        "shards": int,
        "init_folds?": [str],
    },
}
REMEDY = "restore it from a copy, or remove it and type the same flare-pseudolabel run command again"
STOP = {"last_labelled_round": int}
PACKAGES = ("nnunet-flare", "nnunetv2", "torch", "numpy", "batchgeneratorsv2", "blosc2", "SimpleITK")


@dataclass(frozen=True)
class Run:
    """A run, loaded: its folder, settings and validated recipe.

    ``stopped_after`` is the last labelled round where an early stop ended the labelling, as far as it was known when
    the run was loaded; :meth:`current` looks again.
    """

    root: Path
    settings: RunSettings
    recipe: Recipe
    stopped_after: int | None = None

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open a run on disk for reading.

        Raises:
            InputError: when the folder is not a run, or its manifest is damaged.
        """
        return load_run(Path(folder))

    def cases(self) -> list[dict[str, Any]]:
        """Every case in every round as a flat dictionary of plain values; see :func:`case_rows`."""
        return case_rows(self.paths)

    def current(self) -> Run:
        """The run with the early stop that its folder has now."""
        stop = self.paths.stop
        if not stop.is_file():
            return self.as_planned()
        remedy = f"flare-pseudolabel retry -o {self.root} decides that again"
        last: int = read_json(stop, STOP, remedy=remedy)["last_labelled_round"]
        if not 0 <= last < self.recipe.final_round:
            raise InputError(f"{stop}: found round {last}, the recipe has {self.recipe.final_round}")
        return replace(self, stopped_after=last)

    def as_planned(self) -> Run:
        """The run without an early stop."""
        return replace(self, stopped_after=None)

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.root)

    @property
    def raw(self) -> Path:
        return Path(self.settings.folders["nnUNet_raw"]) / self.settings.dataset

    @property
    def preprocessed(self) -> Path:
        return Path(self.settings.folders["nnUNet_preprocessed"]) / self.settings.dataset

    @property
    def results(self) -> Path:
        return Path(self.settings.folders["nnUNet_results"]) / self.settings.dataset

    @property
    def base(self) -> Base:
        """Plans and configuration of the rounds."""
        return Base(self.preprocessed, self.settings.plans_name, *self._base_parts(final=False), "plan")

    @property
    def final_base(self) -> Base:
        """Plans and configuration of the final model: those of the rounds, unless the recipe gives it its own."""
        if self.settings.final_plans_name is None:
            return self.base
        return Base(self.preprocessed, self.settings.final_plans_name, *self._base_parts(final=True), "plan-final")

    @property
    def coarse_base(self) -> Base | None:
        """Plans and configuration of the coarse model; None if the run trains none."""
        roi, name = self.recipe.roi, self.settings.coarse_plans_name
        if roi is None or name is None:
            return None
        return Base(self.preprocessed, name, roi.configuration, roi.planner, roi.plan.changes(), "plan-coarse")

    @property
    def coarse_configuration(self) -> str:
        """Name of the configuration that trains the coarse model."""
        configuration = "" if self.recipe.roi is None else self.recipe.roi.configuration
        return f"{configuration}_{self.settings.name}_coarse"

    @property
    def coarse_model(self) -> Path:
        """The folder of the coarse model: the given one, or the one that the run trains.

        Raises:
            InputError: if the recipe has no coarse model.
        """
        roi = self.recipe.roi
        if roi is None:
            raise InputError(f"{self.root}: recipe {self.recipe.name} has no coarse model (roi)")
        if roi.model is not None:
            return Path(roi.model)
        return self.results / f"{roi.trainer}__{self.settings.coarse_plans_name}__{self.coarse_configuration}"

    def _base_parts(self, *, final: bool) -> tuple[str, str, dict[str, Any]]:
        planner, configuration, changes = self.recipe.base_changes(final=final)
        return configuration, planner, changes

    @property
    def plans_file(self) -> Path:
        """The plans of the rounds."""
        return self.base.plans_file

    @property
    def base_data(self) -> Path:
        """The preprocessed labelled cases of the rounds."""
        return self.base.data

    @property
    def base_identifier(self) -> str:
        return f"{self.settings.plans_name}_{self.recipe.configuration}"

    @property
    def unlabelled_data(self) -> Path:
        """The preprocessed unlabelled cases: shared by all runs with these plans, unless a coarse model crops them."""
        own = "" if self.recipe.roi is None else f"_{self.settings.name}"
        return self.preprocessed / f"{self.base_identifier}{own}_un"

    @property
    def final(self) -> Round:
        """The final training on all data."""
        return self.round(self._final_number)

    @property
    def rounds(self) -> list[Round]:
        """Every round, the final training and its fine-tuning."""
        more = self.recipe.final.finetune is not None
        return [self.round(number) for number in range(self._final_number + 1 + more)]

    @property
    def _final_number(self) -> int:
        return self.recipe.final_round if self.stopped_after is None else self.stopped_after + 1

    def round(self, number: int) -> Round:
        """One round.

        Raises:
            ValueError: if the run has no round with this number.
        """
        final, recipe = self._final_number, self.recipe
        if not 0 <= number <= final + (recipe.final.finetune is not None):
            raise ValueError(f"{self.root}: no round {number}; the final training is round {final}")
        kind: Kind = "fine-tuning" if number > final else "final" if number == final else "self-training"
        if kind == "self-training" and recipe.starts(number):
            kind = "supervised"
        is_final, planned = number >= final, number if number < final else number - final + recipe.final_round
        base = self.final_base if is_final else self.base
        trainer = (is_final and recipe.final.trainer) or recipe.trainer
        configuration = f"{base.configuration}_{self.settings.name}_r{number}"
        folds, checkpoints = recipe.member_folds(planned), recipe.member_checkpoints(planned)
        model = self.results / f"{trainer}__{base.plans_name}__{configuration}"
        if number == 0 and self.settings.init_model is not None:
            model = Path(self.settings.init_model)
            folds, checkpoints = list(self.settings.init_folds), recipe.given_checkpoints
        own_data = number > 0 and kind != "fine-tuning"
        return Round(
            number=number,
            planned=planned,
            kind=kind,
            loop=None if is_final else recipe.loop_of(number),
            base=base,
            trainer=trainer,
            configuration=configuration,
            data=self.preprocessed / f"{base.plans_name}_{configuration}" if own_data else base.data,
            model=model,
            members=tuple((fold, checkpoint) for fold in folds for checkpoint in checkpoints),
        )

    def environment(self) -> dict[str, str]:
        """The environment of the run's child processes, with nnU-Net's folders as at the start of the run."""
        trusted = {TRUST_VARIABLE: "1"} if self.settings.trust_checkpoint else {}
        return safe_environment({**os.environ, **self.settings.folders, **trusted})


def create_run(root: Path, settings: RunSettings, recipe: Recipe) -> Run:
    """Write a new run's manifest.

    Raises:
        InputError: when the folder holds another run with other settings; the differences are listed.
    """
    paths = RunPaths(root)
    if paths.manifest.is_file():
        run = read_manifest(root)
        known = replace(run.settings, recipe=run.recipe.model_dump(mode="json"))  # with keys that are new since then
        known = replace(known, trust_checkpoint=settings.trust_checkpoint)  # changes no result
        differences = _differences(known, settings)
        if differences:
            raise InputError(
                f"{root} holds a run with other settings: {'; '.join(differences)}. "
                "Give the same settings to resume it, or another --name (and RUN_DIR) to start a new run"
            )
        check_home(run.root, run.settings)
        if settings.trust_checkpoint != run.settings.trust_checkpoint:
            document = read_json(paths.manifest)
            document["settings"]["trust_checkpoint"] = settings.trust_checkpoint
            write_json(paths.manifest, document)
        return replace(run, settings=replace(run.settings, trust_checkpoint=settings.trust_checkpoint))
    claim_name(settings, root)
    token = uuid4().hex
    write_owner(settings, root, recipe.name, token)
    document = {"version": VERSION, "settings": asdict(settings), "made_with": made_with(), "token": token}
    write_json(paths.manifest, document)
    return Run(root, settings, recipe)


def load_run(root: Path) -> Run:
    """The run of a folder, with its early stop where it had one; errors are those of :func:`read_manifest`."""
    return read_manifest(root).current()


def read_manifest(root: Path) -> Run:
    """The run of a folder as it was planned: nothing but its manifest is read.

    Raises:
        InputError: when there is none, or it was written by another version.
    """
    path = RunPaths(root).manifest
    if not path.is_file():
        raise InputError(f"{root} is not a run folder: {path.name} is missing. Start a run with flare-pseudolabel run")
    document = read_json(path, MANIFEST, remedy=REMEDY)
    if document["version"] != VERSION:
        raise InputError(f"{path}: version {document['version']}, this package reads {VERSION}")
    given = {**document["settings"], "init_folds": tuple(document["settings"].get("init_folds", ()))}
    unknown = sorted(given.keys() - RunSettings.__dataclass_fields__.keys())
    if unknown or given["shards"] < 1 or not DATASET.fullmatch(given["dataset"]) or not given["name"]:
        wrong = (
            f"unknown settings {unknown}"
            if unknown
            else "dataset, name or number of shards is not one that a run can have"
        )
        raise InputError(f"{path}: {wrong}; the file is damaged: {REMEDY}")
    settings = RunSettings(**given)
    return Run(root, settings, recipe_from(settings.recipe, f"{path}, recipe"))


def load_run_to_write(root: Path) -> Run:
    """The run of a folder, for a command that writes into it or beside it.

    Raises:
        InputError: as :func:`load_run`, and for a copy of another run's folder.
    """
    run = load_run(root)
    check_home(run.root, run.settings)
    return run


def claim_name(settings: RunSettings, root: Path) -> None:
    """Refuse a run name that belongs to another RUN_DIR.

    Raises:
        InputError: when another RUN_DIR owns the name (their data, results and tables would mix).
    """
    owner = owner_file(settings)
    if owner.is_file():
        other = Path(read_json(owner, {"run_dir": str}, remedy=f"remove it if {root} has that name")["run_dir"])
        if other.resolve() != root.resolve() and RunPaths(other).manifest.is_file():
            raise InputError(
                f"the name '{settings.name}' on {settings.dataset} belongs to the run in {other}, not to {root}. "
                "Choose another --name, or resume that run"
            )


def _differences(old: RunSettings, new: RunSettings) -> list[str]:
    before, after = flat(asdict(old)), flat(asdict(new))
    return [
        f"{key}: {before.get(key)!r} there, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def made_with() -> dict[str, Any]:
    """Versions and hardware, for the record."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "packages": versions,
        "host": platform.node(),
        "system": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
