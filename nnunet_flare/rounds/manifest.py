"""What a run is: its manifest ``run.json``, written once at the start and compared when it is resumed."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.rounds.paths import RunPaths
from nnunet_flare.rounds.recipe import Recipe, recipe_from

VERSION = 1
DATASET = re.compile(r"Dataset\d{3}_.+")
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
OPTIONAL = ("final_plans_name", "coarse_plans_name", "init_model", "eval_images", "eval_labels")
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
REMEDY = "restore it from a copy, or remove it and give the same flare-pseudolabel run command again"
STOP = {"last_labelled_round": int}
PACKAGES = ("nnunet-flare", "nnunetv2", "torch", "numpy", "batchgeneratorsv2", "blosc2", "SimpleITK")


@dataclass(frozen=True)
class Settings:
    """Everything the user chose; a resumed run must have the same.

    ``folders`` are nnU-Net's three; ``final_plans_name`` the final model's plans where it has its own, and
    ``coarse_plans_name`` the coarse model's where the run trains one; ``init_model`` a model folder whose
    ``init_folds`` are round 0's members; ``eval_images`` and ``eval_labels`` held-out cases; ``shards`` the parts that
    labelling is split into.
    """

    name: str
    dataset: str
    plans_name: str
    unlabelled_dir: str
    recipe: dict[str, Any]
    folders: dict[str, str]
    device: str
    shards: int
    final_plans_name: str | None = None
    coarse_plans_name: str | None = None
    init_model: str | None = None
    init_folds: tuple[str, ...] = ()
    eval_images: str | None = None
    eval_labels: str | None = None


@dataclass(frozen=True)
class Base:
    """Plans and configuration that trainings build on: those of the rounds, the final model's or the coarse model's.

    ``task`` is the task that plans it and preprocesses the labelled cases; ``changes`` are the recipe's to the plan.
    """

    preprocessed: Path
    plans_name: str
    configuration: str
    planner: str
    changes: dict[str, Any]
    task: str

    @property
    def plans_file(self) -> Path:
        return self.preprocessed / f"{self.plans_name}.json"

    @property
    def data(self) -> Path:
        """The preprocessed labelled cases."""
        return self.preprocessed / f"{self.plans_name}_{self.configuration}"


@dataclass(frozen=True)
class Run:
    """A run, loaded: its folder, settings and validated recipe."""

    root: Path
    settings: Settings
    recipe: Recipe

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
        """What the rounds build on."""
        return Base(self.preprocessed, self.settings.plans_name, *self._base_parts(final=False), "plan")

    @property
    def final_base(self) -> Base:
        """What the final model builds on: the same, unless the recipe gives it plans of its own."""
        if self.settings.final_plans_name is None:
            return self.base
        return Base(self.preprocessed, self.settings.final_plans_name, *self._base_parts(final=True), "plan-final")

    @property
    def coarse_base(self) -> Base | None:
        """What the coarse model builds on; None where the run trains none."""
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
        """The coarse model's folder: the given one, else the one that the run trains.

        Raises:
            InputError: where the recipe has no coarse model.
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

    def base_of(self, number: int) -> Base:
        """What a round builds on."""
        return self.final_base if number >= self.last_round else self.base

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

    def configuration(self, number: int) -> str:
        """Name of a round's configuration."""
        return f"{self.base_of(number).configuration}_{self.settings.name}_r{number}"

    def trainer(self, number: int) -> str:
        """The trainer of a round."""
        final = self.recipe.final.trainer if number >= self.last_round else None
        return final or self.recipe.trainer

    def data(self, number: int) -> Path:
        """A round's training data; round 0 and a fine-tuning train on the base data."""
        base = self.base_of(number)
        if number == 0 or number > self.last_round:
            return base.data
        return self.preprocessed / f"{base.plans_name}_{self.configuration(number)}"

    def model(self, number: int) -> Path:
        """The model folder of a round, named by stock nnU-Net."""
        if number == 0 and self.settings.init_model is not None:
            return Path(self.settings.init_model)
        name = f"{self.trainer(number)}__{self.base_of(number).plans_name}__{self.configuration(number)}"
        return self.results / name

    @property
    def last_round(self) -> int:
        """Number of the final training on all data: the recipe's rounds, or less after an early stop."""
        if self.paths.stop.is_file():
            remedy = f"flare-pseudolabel retry -o {self.root} decides that again"
            last: int = read_json(self.paths.stop, STOP, remedy=remedy)["last_labelled_round"]
            if not 0 <= last < self.recipe.final_round:
                raise InputError(f"{self.paths.stop}: found round {last}, the recipe has {self.recipe.final_round}")
            return last + 1
        return self.recipe.final_round

    @property
    def final_number(self) -> int:
        """Number of the final model: the final training's, or one more where it is fine-tuned."""
        return self.last_round + (self.recipe.final.finetune is not None)

    def recipe_number(self, number: int) -> int:
        """A round as the recipe counts it, for which an early stop moves the final training and what follows."""
        return number if number < self.last_round else number - self.last_round + self.recipe.final_round

    def environment(self) -> dict[str, str]:
        """The environment of the run's child processes: nnU-Net's folders as at the start of the run."""
        return {**os.environ, **self.settings.folders}


def create_run(root: Path, settings: Settings, recipe: Recipe) -> Run:
    """Write a new run's manifest.

    Raises:
        InputError: when the folder holds another run with other settings; the differences are listed.
    """
    paths = RunPaths(root)
    if paths.manifest.is_file():
        run = load_run(root)
        known = replace(run.settings, recipe=run.recipe.model_dump(mode="json"))  # with keys that are new since then
        differences = _differences(known, settings)
        if differences:
            raise InputError(
                f"{root} holds a run with other settings: {'; '.join(differences)}. "
                "Give the same settings to resume it, or another --name (and RUN_DIR) to start a new run"
            )
        return run
    claim_name(settings, recipe, root)
    document = {"version": VERSION, "settings": asdict(settings), "made_with": made_with()}
    write_json(paths.manifest, document)
    return Run(root, settings, recipe)


def load_run(root: Path) -> Run:
    """The run of a folder.

    Raises:
        InputError: when there is none, or it was written by another version.
    """
    path = RunPaths(root).manifest
    if not path.is_file():
        raise InputError(f"{root} is no run folder: {path.name} is missing. Start one with flare-pseudolabel run")
    document = read_json(path, MANIFEST, remedy=REMEDY)
    if document["version"] != VERSION:
        raise InputError(f"{path}: version {document['version']}, this package reads {VERSION}")
    given = {**document["settings"], "init_folds": tuple(document["settings"].get("init_folds", ()))}
    unknown = sorted(given.keys() - Settings.__dataclass_fields__.keys())
    if unknown or given["shards"] < 1 or not DATASET.fullmatch(given["dataset"]) or not given["name"]:
        wrong = f"unknown settings {unknown}" if unknown else "no run has such a dataset, name or number of shards"
        raise InputError(f"{path}: {wrong}; the file is damaged: {REMEDY}")
    settings = Settings(**given)
    return Run(root, settings, recipe_from(settings.recipe, f"{path}, recipe"))


def claim_name(settings: Settings, recipe: Recipe, root: Path) -> None:
    """Note in the preprocessed folder that this run name belongs to this RUN_DIR.

    Raises:
        InputError: when another RUN_DIR owns the name (their data, results and tables would mix).
    """
    owners = Path(settings.folders["nnUNet_preprocessed"]) / settings.dataset / "flare_runs"
    owner = owners / f"{settings.name}.json"
    if owner.is_file():
        other = Path(read_json(owner, {"run_dir": str}, remedy=f"remove it, if {root} has that name")["run_dir"])
        if other.resolve() != root.resolve() and RunPaths(other).manifest.is_file():
            raise InputError(
                f"the name '{settings.name}' on {settings.dataset} belongs to the run in {other}, not to {root}. "
                "Choose another --name, or resume that run"
            )
    write_json(owner, {"run_dir": str(root.resolve()), "recipe": recipe.name})


def _differences(old: Settings, new: Settings) -> list[str]:
    before, after = _flat(asdict(old)), _flat(asdict(new))
    return [
        f"{key}: {before.get(key)!r} there, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


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
