#!/bin/sh
# The steps of an image, which docker/Dockerfile and docker/nnunet-flare.def share:
#
#   build.sh packages REQUIREMENTS TORCH   what both environments need; TORCH is what pip is asked for, as torch==2.13.0
#   build.sh install SOURCE                this package in both
#   build.sh export MODEL OUT [OPTIONS]    the trained model, as flare-predict opens it without PyTorch
#
# /opt/full has PyTorch and nnU-Net, exports the model and is left behind. /opt/flare is what prediction needs.
set -eu

step=$1
shift

# into_flare ARGUMENTS: pip install in the environment that has no pip of its own
into_flare() {
  /opt/full/bin/python -m pip --python /opt/flare/bin/python install --no-cache-dir "$@"
}

case $step in
  packages)
    python3 -m venv /opt/full
    python3 -m venv --without-pip /opt/flare
    into_flare -r "$1"
    # In one go: else what nnU-Net asks for replaces the chosen PyTorch. Left unquoted on purpose: options of pip may
    # stand beside the name.
    # shellcheck disable=SC2086
    /opt/full/bin/python -m pip install --no-cache-dir $2 nnunetv2 openvino
    ;;
  install)
    /opt/full/bin/python -m pip install --no-cache-dir "$1[openvino]"
    into_flare --no-deps "$1"
    # Of the packages, what a CPU does not need: their tests, OpenVINO's GPUs and its readers of foreign networks.
    cd /opt/flare/lib/python3*/site-packages
    find . -depth -type d -name tests -exec rm -rf {} +
    for part in intel_gpu_plugin intel_npu onnx_frontend tensorflow pytorch_frontend paddle_frontend jax_frontend gguf_frontend; do
      rm -f openvino/libs/libopenvino_"$part"*
    done
    rm -f openvino/libs/cache.json
    ;;
  export)
    model=$1 out=$2
    shift 2
    /opt/full/bin/flare-export -m "$model" -o "$out" "$@"
    chmod -R a+rX "$out" /opt/flare
    ;;
  *)
    sed -n '2,8p' "$0"
    exit 2
    ;;
esac
