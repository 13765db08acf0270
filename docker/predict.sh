#!/bin/sh
# FLARE's convention: `sh predict.sh` in /workspace segments every /workspace/inputs/<case>_0000.nii.gz
# into /workspace/outputs/<case>.nii.gz. Every path and the options can be set from outside.
set -eu

inputs=${FLARE_INPUTS:-/workspace/inputs}
outputs=${FLARE_OUTPUTS:-/workspace/outputs}
model=${FLARE_MODEL:-/workspace/model}

# Left unquoted on purpose: several options may stand in one variable.
# shellcheck disable=SC2086
exec flare-predict -i "$inputs" -o "$outputs" -m "$model" --disable_progress_bar ${FLARE_OPTIONS:-}
