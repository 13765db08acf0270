"""Export from a run: a round as an nnU-Net dataset, the ledger as CSV. The final model: ``share.py``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_flare.cases import FILE_NAME, Case, read_table, table_name, write_table
from nnunet_flare.errors import InputError
from nnunet_flare.files import link_or_copy, remove_leftovers, scratch_folder, write_json
from nnunet_flare.outputs import check_document, put_new
from nnunet_flare.rounds.run.configurations import read_plans, resolve
from nnunet_flare.rounds.run.dataset import base_table, dataset_json, organ_ids, raw_files
from nnunet_flare.rounds.run.ledger import Entry, export_csv, read_decisions, read_ledger
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.sources import differences
from nnunet_flare.rounds.run.unlabelled import read_list
from nnunet_flare.rounds.stages.arrays import read_properties
from nnunet_flare.rounds.stages.label_maps import ignore_label, write_label_map
from nnunet_flare.rounds.stages.preprocess import MADE_FROM, changed_images
from nnunet_flare.trainers.settings import KEY


@dataclass(frozen=True)
class DatasetExport:
    """What :func:`export_dataset` will write: of which round, by whose selection, and where."""

    round: int
    source: int
    taken: list[Entry]
    target: Path


def check_ledger(run: Run, path: Path) -> None:
    """Refuse a place where :func:`export_ledger` would replace something else.

    Raises:
        InputError: when the name is not that of a table, or is a file of the run.
    """
    is_of_run = (
        path.exists() and run.root.resolve() in path.resolve().parents and path.resolve().parent != run.root.resolve()
    )
    if is_of_run:
        raise InputError(f"export --ledger {path}: is a file of the run; choose another name")
    check_document(path, (".csv",), option="export --ledger")


def export_ledger(run: Run, path: Path) -> Path:
    """The ledger as CSV, one row per case and round; raises as :func:`check_ledger`."""
    check_ledger(run, path)
    export_csv(read_ledger(run.paths), list(organ_ids(run)), path)
    return path


def check_dataset(run: Run, number: int | None, dataset_id: int) -> DatasetExport:
    """What :func:`export_dataset` will write of a round; of the final one where none is named.

    Raises:
        InputError: when the id is taken, the round has no selection to export, or scans are missing or not those that
            it labelled.
    """
    number = run.final.number if number is None else number
    if not 0 < number <= run.final.number:
        raise InputError(f"export --round {number}: expected 1 to {run.final.number}; round 0 is the dataset itself")
    if run.round(number).loop is not None:
        raise InputError(
            f"export --round {number}: belongs to a loop, whose label maps have only some organs; export the final "
            f"round, {run.final.number}"
        )
    source = number if run.recipe.loops else number - 1  # loops are merged when the final round is built
    if not run.paths.decisions(source).is_file():
        raise InputError(f"export --round {number}: round {source} has selected no cases yet; see status")
    if not 0 < dataset_id < 1000:
        raise InputError(f"export --dataset {dataset_id}: expected an id from 1 to 999")
    raw = run.raw.parent
    taken_id = [p.name for p in raw.glob(f"Dataset{dataset_id:03d}_*")]
    if taken_id:
        raise InputError(f"export --dataset {dataset_id}: {raw / taken_id[0]} exists already; choose another id")
    taken = [entry for entry in read_decisions(run.paths, source) if entry.decision == "taken"]
    ignoring = [entry.case for entry in taken if entry.ignored]
    if any(not run.paths.members(source, case).is_file() for case in ignoring):
        raise InputError(
            f"export --round {number}: {len(ignoring)} cases have ignored organs; these are drawn from the members' "
            f"label maps, and those are missing ({run.paths.round(source) / 'members'}; removed by clean?)"
        )
    images = {scan.case: scan.images for scan in read_list(run.paths.unlabelled)}
    pseudo = [entry.case for entry in taken if entry.case in images]
    changed = [case for case in pseudo if _is_another_scan(run, number, case, images[case])]
    if changed:
        raise InputError(
            f"export --round {number}: {len(changed)} scan(s) changed since they were labelled "
            f"({', '.join(changed[:5])}); restore them"
        )
    labelled = [file for files in raw_files(run).values() for file in (*files["images"], files["label"])]
    scans = [*(image for case in pseudo for image in images[case]), *labelled]
    gone = [os.path.realpath(file) for file in scans if not os.path.exists(file)]
    if gone:
        raise InputError(
            f"export --round {number}: {len(gone)} file(s) are missing: {', '.join(gone[:5])}; restore them"
        )
    name = f"Dataset{dataset_id:03d}_{run.settings.dataset.split('_', 1)[1]}_{run.settings.name}_r{number}"
    return DatasetExport(number, source, taken, raw / name)


def _is_another_scan(run: Run, number: int, case: str, images: Sequence[str]) -> bool:
    """Whether a scan's files are not those that were labelled, as far as the arrays say that are still there."""
    names, now = changed_images(run.unlabelled_data, case, images)
    if names:
        return True
    labelled_by = run.recipe.last_rounds() or [number - 1]
    kept = [*(run.paths.properties(before, case) for before in labelled_by), run.round(number).data / f"{case}.pkl"]
    noted = [read_properties(path).get(MADE_FROM) for path in kept if path.is_file()]
    return any(differences([{"digest": digest} for digest in made_from], now) for made_from in noted if made_from)


def export_dataset(run: Run, number: int | None, dataset_id: int) -> Path:
    """Write the data of a round's training as ``nnUNet_raw/Dataset<id>_<name>``: images linked, NIfTI labels.

    Where organs were ignored, the label maps hold the *ignore* value and dataset.json declares it. Raises as
    :func:`check_dataset`.
    """
    export = check_dataset(run, number, dataset_id)
    raw = export.target.parent
    remove_leftovers(raw)
    with scratch_folder(raw) as room:
        scratch = room / export.target.name
        _fill(scratch, run, export)
        put_new(scratch, export.target)
    return export.target


def _fill(folder: Path, run: Run, export: DatasetExport) -> None:
    """Write a dataset's scans, label maps, case table and dataset.json."""
    number, taken = export.round, export.taken
    document = dataset_json(run)
    ending = document["file_ending"]
    images, labels = folder / "imagesTr", folder / "labelsTr"
    images.mkdir(parents=True)
    labels.mkdir()
    table = base_table(run)
    if run.recipe.loops:
        table = read_table(run.preprocessed / table_name(run.round(number).configuration), labels=document["labels"])
    merged = {entry.case for entry in taken if entry.role == "partial"}
    cases: dict[str, Case] = {}
    for case, files in raw_files(run).items():
        cases[case] = table[case]
        _link(files["images"], images, case, ending)
        if case not in merged:
            link_or_copy(Path(files["label"]), labels / f"{case}{ending}")
    scans = {case.case: case.images for case in read_list(run.paths.unlabelled)}
    for entry in taken:
        write_label_map(run, export.source, entry, labels / f"{entry.case}{ending}", ending)
        if entry.case not in merged:
            cases[entry.case] = table[entry.case] if run.recipe.loops else Case("pseudo", round=number)
            _link(scans[entry.case], images, entry.case, ending)
    new = {k: v for k, v in document.items() if k != "dataset"}
    new["numTraining"] = len(cases)
    if _has_ignore(run, number, taken):
        new["labels"] = {**document["labels"], "ignore": ignore_label(run)}
    write_json(folder / "dataset.json", new)
    write_table(folder / FILE_NAME, cases)


def _link(channels: Iterable[str | Path], folder: Path, case: str, ending: str) -> None:
    """Link a scan's files, one a channel, by nnU-Net's names."""
    for channel, file in enumerate(channels):
        os.symlink(Path(file).resolve(), folder / f"{case}_{channel:04d}{ending}")


def _has_ignore(run: Run, number: int, taken: Sequence[Entry]) -> bool:
    """Whether some exported label map holds the *ignore* value."""
    if not run.recipe.loops:
        return any(entry.ignored for entry in taken)
    path = run.round(number).base.plans_file
    settings = resolve(read_plans(path), run.round(number).configuration, path, shape={f"{KEY}?": dict}).get(KEY, {})
    return settings.get("ignore_label") is not None
