"""flare-postprocess: clean label maps by a pipeline, learn its thresholds, or choose its operations by Dice."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnunet_flare.cli.common import PROCESSES, number, open_streams, run_command, setup_logging
from nnunet_flare.cli.parser import HyphenParser
from nnunet_flare.cli.terminal import columns, next_step
from nnunet_flare.tables import table

PROGRAM = "flare-postprocess"

DOCUMENTS = (".yaml", ".yml")
"""Endings of pipelines that may be replaced."""

LABELS_HELP = "label set of the maps: flare22 (default), flare23 (with lesions), flare24-lesion, ... or a dataset.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 all cases done, 1 some failed, 2 wrong usage or input."""
    open_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["learn"]:
        return run_command(PROGRAM, lambda: _learn(words[1:]))
    if words[:1] == ["tune"]:
        return run_command(PROGRAM, lambda: _tune(words[1:]))
    return run_command(PROGRAM, lambda: _apply(words))


def _apply(words: list[str]) -> int:
    parser = HyphenParser(
        prog=PROGRAM,
        description="Apply a post-processing pipeline to label maps. The output has the same names and geometry, as "
        "uint8.",
        epilog="flare-postprocess learn makes a pipeline with the organ volumes of a training set, "
        "flare-postprocess tune chooses the operations that raise the Dice of validation predictions.",
    )
    parser.add_argument(
        "-i", type=Path, required=True, metavar="IN", help="folder of label maps <case>.nii.gz, or one file"
    )
    parser.add_argument(
        "-o", type=Path, required=True, metavar="OUT", help="folder to write into, not -i; existing files are replaced"
    )
    parser.add_argument(
        "--pipeline",
        default="flare22",
        metavar="NAME",
        help="flare22 (default), flare22-paper, single-label, sztu, largest, or a YAML file",
    )
    parser.add_argument(
        "--image",
        type=Path,
        metavar="DIR",
        help="images <case>_0000.nii.gz; their spacing and orientation replace those of label maps with lost headers",
    )
    parser.add_argument("--labels", metavar="SET", help=f"{LABELS_HELP}; a pipeline file may set another default")
    args = _parse(parser, words)
    from nnunet_flare.postprocessing.folder import postprocess_folder
    from nnunet_flare.postprocessing.pipeline import load_pipeline

    pipeline = load_pipeline(args.pipeline, labels=args.labels)
    result = postprocess_folder(args.i, args.o, pipeline, images=args.image, processes=args.np)
    changed = [change for change in result.changes if change.erased_ml or change.relabelled_ml]
    for change in changed:
        print(f"{change.case}: {change.erased_ml:.2f} mL erased, {change.relabelled_ml:.2f} mL relabelled")
    print(f"{len(result.changes)} cases written to {args.o}, {len(changed)} of them changed by {pipeline.name}")
    return _report(result.failed)


def _learn(words: list[str]) -> int:
    parser = HyphenParser(
        prog=f"{PROGRAM} learn",
        description="Measure the smallest volume of every organ in training labels and write a pipeline with them.",
    )
    parser.add_argument("-i", type=Path, required=True, metavar="DIR", help="training label maps (labelsTr)")
    parser.add_argument("-o", type=Path, required=True, metavar="FILE.yaml", help="pipeline to write")
    parser.add_argument(
        "--base",
        default="flare22",
        metavar="NAME",
        help="pipeline whose organ volumes are replaced (default flare22); one without volumes gets them for all "
        "organs",
    )
    parser.add_argument(
        "--fraction",
        type=number(0, 1, above=True),
        default=0.5,
        metavar="F",
        help="erase an organ below this share of its smallest volume (default 0.5, as Radboud)",
    )
    parser.add_argument("--labels", metavar="SET", help=LABELS_HELP)
    args = _parse(parser, words)
    from nnunet_flare.listing import images_in
    from nnunet_flare.outputs import check_document
    from nnunet_flare.postprocessing.document import learned_notes, write_pipeline
    from nnunet_flare.postprocessing.learn import smallest_organs, with_learned_volumes
    from nnunet_flare.postprocessing.pipeline import load_pipeline

    base = load_pipeline(args.base, labels=args.labels)
    inputs = [*images_in(args.i), Path(args.base), None if args.labels is None else Path(args.labels)]
    check_document(args.o, DOCUMENTS, inputs)
    learned = smallest_organs(args.i, base.labels, processes=args.np)
    content = with_learned_volumes(base, learned, fraction=args.fraction)
    notes, remarks = learned_notes(content, learned)
    write_pipeline(args.o, content, notes=notes, remarks=remarks)
    rows = [
        [entry.organ, f"{entry.volume_mm3 / 1000:.2f} mL", f"{entry.case} (smallest of {entry.cases})"]
        for entry in learned.smallest
    ]
    print("\n".join(table(rows, align="lrl", width=columns())))
    print(f"{args.o}: {content.description}")
    next_step(f"flare-postprocess -i IN -o OUT --pipeline {args.o}")
    return _report(learned.failed)


def _tune(words: list[str]) -> int:
    parser = HyphenParser(
        prog=f"{PROGRAM} tune",
        description="Try each operation on validation predictions. Keep those that raise the mean Dice without "
        "lowering any organ by more than --max_loss; the YAML file says what each step gained and why the others "
        "were left out.",
    )
    parser.add_argument("-i", type=Path, required=True, metavar="DIR", help="predicted label maps of validation cases")
    parser.add_argument("-ref", type=Path, required=True, metavar="DIR", help="their reference label maps")
    parser.add_argument("-o", type=Path, required=True, metavar="FILE.yaml", help="pipeline to write")
    parser.add_argument(
        "--max_loss",
        type=number(0, 1),
        default=0.0,
        metavar="D",
        help="mean Dice that one organ may lose by a step (default 0, as in nnU-Net)",
    )
    parser.add_argument(
        "--volumes",
        metavar="NAME",
        help="pipeline whose organ volumes are tried, such as one made by learn (default: FLARE22's training set)",
    )
    parser.add_argument("--labels", default="flare22", metavar="SET", help=LABELS_HELP)
    args = _parse(parser, words)
    from nnunet_flare.listing import images_in
    from nnunet_flare.outputs import check_document
    from nnunet_flare.postprocessing.document import tuned_notes, write_pipeline
    from nnunet_flare.postprocessing.labelset import label_set
    from nnunet_flare.postprocessing.learn import volumes_of
    from nnunet_flare.postprocessing.pipeline import load_pipeline
    from nnunet_flare.postprocessing.tune import tune

    labels = label_set(args.labels)
    named = [] if args.volumes is None else [Path(args.volumes)]
    inputs = [*images_in(args.i), *images_in(args.ref), *named, Path(args.labels)]
    check_document(args.o, DOCUMENTS, inputs)
    volumes = volumes_of(load_pipeline(args.volumes, labels=args.labels)) if args.volumes else None
    tuned = tune(args.i, args.ref, labels, minimum_mm3=volumes, max_loss=args.max_loss, processes=args.np)
    notes, remarks = tuned_notes(tuned)
    write_pipeline(args.o, tuned.content, notes=notes, remarks=remarks)
    for trial in tuned.trials:
        print(f"{trial.title}: {trial.before:.4f} to {trial.after:.4f}, {trial.reason}")
    print(f"{args.o}: {tuned.content.description}")
    next_step(f"flare-postprocess -i IN -o OUT --pipeline {args.o}")
    return _report(tuned.failed)


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    parser.add_argument(
        "-np", type=PROCESSES, default=None, metavar="N", help="worker processes (default: one per core)"
    )
    args = parser.parse_args(words)
    setup_logging()
    return args


def _report(failed: Sequence[tuple[str, str]]) -> int:
    for case, reason in failed:
        sys.stderr.write(f"{PROGRAM}: left out: {case}: {reason}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
