"""Predict a scan, look at it, measure its organs, compare with the truth. The notebook beside this file is the same.

It needs no data and no GPU: scan, truth and network are made here. Take your own scan and model folder in their place.
Run it in an empty folder: ``python predict_and_compare.py``. It takes some minutes on two cores.
"""

# %% [markdown]
# # Predict, look, measure, compare
#
# The scans are synthetic. A tiny network is trained for a minute or two, so its result is rough.

# %%
import os
from pathlib import Path

from nnunet_flare.phantom import write_phantom

data = Path("example").absolute()
write_phantom(data, labelled=4, unlabelled=2, test=1, size=(48, 96, 96), seed=0)
folders = {name: data / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
for name, folder in folders.items():
    folder.mkdir(exist_ok=True)
    os.environ[name] = str(folder)

# %% [markdown]
# ## Train
#
# `demo` is a recipe of minutes. `run_local` works until the run is done; after an interruption it goes on.

# %%
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.check_input import Request
from nnunet_flare.rounds.executors.local import run_local
from nnunet_flare.rounds.start import plan_run, start_run

# The same as: flare-pseudolabel run --recipe demo --set members.count=2
settings = {"members.count": "2"}
plan = plan_run(Request("22", data / "unlabelled", device="cpu"), load_recipe("demo", settings), folders)
run = start_run(plan)
run_local(run)

# %% [markdown]
# ## What the run decided
#
# One row of plain values for each case and round. `pandas.DataFrame(rows)` makes a table of them.

# %%
from nnunet_flare.rounds.run.manifest import Run

run = Run.open(run.root)
rows = run.cases()
for row in rows:
    print(f"{row['case']:<16} {row['decision']:<8} {row['reason']}")

# %% [markdown]
# ## Predict a scan
#
# `labels` is an array (z, y, x) of label ids, on the scan's own grid.

# %%
from nnunet_flare.images import read_labels, read_volume, write_labels
from nnunet_flare.inference.predictor import FlarePredictor

(scan_file,) = (data / "test" / "images").glob("*_0000.nii.gz")
predictor = FlarePredictor.from_model_folder(run.rounds[-1].model, device="cpu", backend="torch")
labels = predictor.predict(scan_file)
scan = read_volume(scan_file)
write_labels(Path("prediction.nii.gz"), labels, scan)
print(labels.shape, labels.dtype, [round(edge, 2) for edge in scan.spacing_mm], "mm")

# %% [markdown]
# ## Look at it
#
# The three planes with most organs. In a notebook, the last line shows the picture.

# %%
from nnunet_flare.inference.previews import draw_preview
from nnunet_flare.rounds.run.dataset import organ_ids

names = {ids[0]: name for name, ids in organ_ids(run).items()}
picture = draw_preview(scan, labels, names)
picture.save("prediction.png")
picture

# %% [markdown]
# ## Volumes
#
# In millilitres, and the mean CT number of each organ.

# %%
from nnunet_flare.inference.statistics import organ_statistics

voxel_mm3 = scan.spacing_mm[0] * scan.spacing_mm[1] * scan.spacing_mm[2]
statistics = organ_statistics(labels, scan.array, voxel_mm3, names)
for name, (_, _, volume_ml, mean_hu) in statistics.items():
    print(f"{name:<26} {volume_ml:8.1f} ml  {'no voxel' if mean_hu is None else f'{mean_hu:.0f} HU'}")

# %% [markdown]
# ## Compare with the truth
#
# Dice: 1 is the same voxels, 0 is none in common.

# %%
from nnunet_flare.evaluation.overlap import dice

truth = read_labels(data / "test" / "labels" / scan_file.name.replace("_0000.nii.gz", ".nii.gz")).array
scores = dice(truth, labels, list(names))
for number, score in scores.items():
    print(f"{names[number]:<26} {score:.3f}")
print(f"{'mean':<26} {sum(scores.values()) / len(scores):.3f}")
