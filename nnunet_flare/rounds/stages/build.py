"""A round's training data: hard links to arrays that exist already, and the new labels of the pseudo cases.

Nothing is preprocessed again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare import plugin
from nnunet_flare.cases import Case, table_name, write_table
from nnunet_flare.errors import TaskError
from nnunet_flare.files import remove_scratch
from nnunet_flare.fusion.members import ignore_uncertain
from nnunet_flare.labels import sampled_groups
from nnunet_flare.rounds.run.configurations import base_configuration, write_configuration
from nnunet_flare.rounds.run.dataset import base_table, dataset_json, organ_ids, raw_cases
from nnunet_flare.rounds.run.decisions import load_reviews
from nnunet_flare.rounds.run.ledger import Entry, read_decisions
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Base, Round
from nnunet_flare.rounds.run.tasks import takes_pretrained
from nnunet_flare.rounds.run.unlabelled import read_list
from nnunet_flare.rounds.stages.arrays import label_hash, read_array, read_properties
from nnunet_flare.rounds.stages.data_folder import building
from nnunet_flare.rounds.stages.epoch_lengths import iterations_of_pass, pass_of_round
from nnunet_flare.rounds.stages.label_maps import ignore_label
from nnunet_flare.rounds.stages.preprocess import MADE_FROM, failure, odd
from nnunet_flare.rounds.stages.replanned import cases_folder, has_same_arrays, prepare_cases
from nnunet_flare.rounds.stages.score_tables import write_decisions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """What trains a round.

    Attributes:
        cases: how many it has in all.
        pseudo: of these, with pseudo-labels.
        unlabelled: of these, without labels (online training).
        links: files of the data folder by how they were made.
        ignored: shares of ignored voxels by case and organ.
        failed: why taken cases were left out that the plans of the final model could not preprocess.
    """

    cases: int
    pseudo: int
    unlabelled: int
    links: dict[str, int]
    ignored: dict[str, dict[str, float]]
    failed: dict[str, str]

    def counts(self) -> dict[str, int]:
        """The numbers that a task's marker keeps."""
        return {"cases": self.cases, "pseudo": self.pseudo, "unlabelled": self.unlabelled, **self.links}


def build_round(run: Run, of: Round) -> dict[str, Any]:
    """Make everything that trains a round: its data, its table of cases and its configuration.

    A supervised round and a fine-tuning train on the labelled cases as they are. The others add the cases that the
    round before took.
    """
    if of.learns_from is None:
        return build_training(run, of.configuration, of, []).counts()
    entries = read_decisions(run.paths, of.learns_from)
    taken = [entry for entry in entries if entry.decision == "taken"]
    built = build_training(run, of.configuration, of, taken)
    if built.ignored or built.failed:
        write_decisions(run.paths, of.learns_from, [_as_built(entry, built) for entry in entries])
    return built.counts()


def _as_built(entry: Entry, built: Built) -> Entry:
    """A case's entry with what became of it when the data was built."""
    if entry.case in built.failed:
        return replace(entry, decision="failed", reason=f"{built.failed[entry.case]}; {entry.reason}")
    return replace(entry, ignored=built.ignored.get(entry.case, entry.ignored))


def build_training(run: Run, name: str, of: Round, taken: Sequence[Entry]) -> Built:
    """Make a configuration that trains on the labelled cases and the pseudo-labels ``taken`` in the round before.

    Args:
        run: the run.
        name: name of the configuration; its data folder is ``<plans>_<name>``, or the base's without pseudo-labels.
        of: the round whose training settings it gets.
        taken: the pseudo-labelled cases.
    """
    table = base_table(run)
    cases = {case: table[case] for case in raw_cases(run)}
    if not any(case.role in ("labelled", "partial") for case in cases.values()):
        raise TaskError(f"{run.settings.dataset}: no labelled case; at least one labelled or partial case is needed")
    check_planned(run, of.base, list(cases))
    links: dict[str, int] = {}
    shares: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    identifier = None
    if taken:
        before, base = of.number - 1, of.base
        check_labels(run, before, taken)
        identifier = f"{base.plans_name}_{name}"
        target = run.preprocessed / identifier
        if has_same_arrays(run.base, base):
            links, shares = _link_pseudo_cases(run, base, target, list(cases), before, taken)
        else:
            failed = prepare_cases(run, base, target, before, taken)
            taken = [entry for entry in taken if entry.case not in failed]
            if not taken:
                case, reason = next(iter(failed.items()))
                raise TaskError(f"none of the taken cases could be preprocessed for the final model; {case}: {reason}")
            shares = {e.case: _with_ignore(run, before, e)[1] for e in taken if e.ignored}
            links = _link_prepared_cases(base, target, list(cases), taken)
        cases |= {entry.case: Case("pseudo", round=of.number) for entry in taken}
    stream = _stream(run) if run.recipe.is_online else []
    cases |= {case: Case("unlabelled") for case in stream}
    write_table(run.preprocessed / table_name(name), cases)
    ignored = ignore_label(run) if any(entry.ignored for entry in taken) else None
    settings = run.recipe.settings(
        of.planned,
        run=run.settings.name,
        stored_round=of.number,
        ignore_label=ignored,
        **initial_weights(run, of),
        iterations=_iterations_of_pass(run, of, cases),
        unlabelled=run.unlabelled_data.name if stream else None,
        references=run.unlabelled_data.name if run.recipe.matches_histograms(of.planned) else None,
        teacher=_teacher(run, of),
    )
    write_configuration(run, name, of, data_identifier=identifier, training=settings.to_json())
    return Built(len(cases), len(taken), len(stream), links, shares, failed)


def _iterations_of_pass(run: Run, of: Round, cases: Mapping[str, Case]) -> int | None:
    """Iterations of an epoch of a round that trains on some cases, where the recipe counts passes."""
    if not run.recipe.counts_passes:
        return None
    roles = Counter(case.role for case in cases.values())
    batch = base_configuration(of.base)["batch_size"]
    samples = pass_of_round(run, of, roles["labelled"] + roles["partial"], roles["pseudo"])
    return iterations_of_pass(samples, batch)


def _stream(run: Run) -> list[str]:
    """The unlabelled cases that an online training learns from: those that could be read, are not odd (unless they are
    to be kept) and that no person rejected.
    """
    folder, reviews = run.unlabelled_data, load_reviews(run)
    ready = [case.case for case in read_list(run.paths.unlabelled) if failure(folder, case.case) is None]
    kept = [case for case in ready if run.recipe.selection.keep_odd or not odd(folder, case)]
    kept = [case for case in kept if case not in reviews or not reviews[case].is_rejected]
    log.info("%d of %d unlabelled scans take part in the training", len(kept), len(read_list(run.paths.unlabelled)))
    if not kept:
        raise TaskError(
            f"{folder}: none of {len(ready)} readable unlabelled scans takes part: all are odd or rejected. "
            "flare-pseudolabel status names "
            "them; --set selection.keep_odd=true takes odd ones"
        )
    return kept


def _teacher(run: Run, of: Round) -> dict[str, Any] | None:
    """The given model, where the round's trainer learns from a teacher."""
    if run.settings.init_model is None or plugin.learns_from(of.trainer) != plugin.TEACHER:
        return None
    fold = run.settings.init_folds[0]
    return {"folder": run.settings.init_model, "fold": fold if fold == "all" else int(fold)}


def initial_weights(run: Run, of: Round) -> dict[str, Any]:
    """The checkpoint that a round's training starts from, and what of it.

    The final model for its fine-tuning; a member of the round before where ``final.start`` or ``members.start`` say so;
    else what the recipe gives, and nothing where it starts anew.
    """
    if of.kind == "fine-tuning":
        return {"init_from": str(run.final.model / "fold_all" / "checkpoint_final.pth")}
    start = {"final": run.recipe.final.start, "self-training": run.recipe.members.start}.get(of.kind)
    if start == "member":
        before = run.round(of.number - 1)
        fold, checkpoint = before.members[0]
        return {"init_from": str(before.model / f"fold_{fold}" / checkpoint)}
    if plugin.learns_from(of.trainer) is not None and takes_pretrained(run, of):
        training = run.recipe.training
        part = training.get("pretrained_part", "but-head")
        return {"init_from": str(Path(training["pretrained_weights"]).expanduser().absolute()), "init_part": part}
    return {}


def check_planned(run: Run, base: Base, cases: Sequence[str]) -> None:
    """Every labelled case must have been there when the dataset was planned and preprocessed.

    Raises:
        TaskError: naming those that came later.
    """
    added = [case for case in cases if not (base.data / f"{case}.pkl").is_file()]
    if added:
        raise TaskError(
            f"{base.data}: {len(added)} labelled case(s) are not preprocessed ({', '.join(added[:5])}). If they were "
            f"added to {run.raw} after the start, move them out until this run is over; a new run takes them"
        )


def check_labels(run: Run, number: int, taken: Sequence[Entry]) -> None:
    """Every taken label must be the one that was judged, of the scan that it will train with.

    A damaged one is removed and made anew by the next try; so is that of a scan that was replaced, which another run on
    the dataset has preprocessed again.
    """
    damaged = []
    for entry in taken:
        try:
            label = read_array(run.paths.training_label(number, entry.case))[0]
            properties = read_properties(run.paths.properties(number, entry.case))
            intact = label_hash(np.maximum(label, 0)) == entry.label_sha256
            scan = run.unlabelled_data / f"{entry.case}.pkl"
            if entry.role == "pseudo" and scan.is_file():  # a partial case may have been an earlier run's scan
                intact &= read_properties(scan).get(MADE_FROM) == properties.get(MADE_FROM)
        except OSError:
            intact = False
        if not intact:
            damaged.append(entry.case)
    if damaged:
        for case in damaged:
            run.paths.case(number, case).unlink(missing_ok=True)
        for path in run.paths.root.glob(f"tasks/label-r{number}-*.done.json"):
            path.unlink()
        run.paths.done(f"select-r{number}").unlink(missing_ok=True)
        raise TaskError(
            f"round {number}: the labels of {len(damaged)} cases, or their scans, are damaged or changed since they "
            f"were judged ({', '.join(damaged[:5])}). The labels were removed; run the same command again to label "
            "them again"
        )


def _link_prepared_cases(base: Base, target: Path, base_cases: Sequence[str], taken: Sequence[Entry]) -> dict[str, int]:
    """Build ``target`` of labelled cases and of pseudo cases that the plans of ``base`` preprocessed already."""
    with building(target) as folder:
        for case in base_cases:
            folder.link_case(base.data, case)
        for entry in taken:
            folder.link_case(cases_folder(target), entry.case)
    remove_scratch(cases_folder(target))
    return dict(folder.links)


def _link_pseudo_cases(
    run: Run, base: Base, target: Path, base_cases: Sequence[str], number: int, taken: Sequence[Entry]
) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    """Build ``target`` of labelled cases and of scans with the labels of round ``number``.

    Returns its links, and the shares of ignored voxels by case and organ, where there are any.
    """
    shares: dict[str, dict[str, float]] = {}
    patch = base_configuration(run.base)["patch_size"]
    groups = sampled_groups(dataset_json(run)["labels"], organ_ids(run))
    with building(target) as folder:
        for case in base_cases:
            folder.link_case(base.data, case)
        for entry in taken:
            case, properties = entry.case, run.paths.properties(number, entry.case)
            folder.link(run.unlabelled_data / f"{case}.b2nd", f"{case}.b2nd")
            if entry.ignored:
                label, shares[case] = _with_ignore(run, number, entry)
                folder.write_label(case, label, read_properties(properties), groups=groups, patch=patch)
            else:
                folder.link(run.paths.training_label(number, case), f"{case}_seg.b2nd")
                folder.link(properties, f"{case}.pkl")
    return dict(folder.links), shares


def _with_ignore(run: Run, number: int, entry: Entry) -> tuple[np.ndarray, dict[str, float]]:
    """The training label of a case with its uncertain organs ignored, and their shares of the voxels by name."""
    organs = organ_ids(run)
    label = read_array(run.paths.training_label(number, entry.case))[0]
    members = read_array(run.paths.members(number, entry.case))
    uncertain = {name: organs[name] for name in entry.ignored}
    return ignore_uncertain(label, list(members), uncertain, ignore_label(run))
