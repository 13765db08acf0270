"""The 3-D viewer that a report's page loads: NiiVue, a package of its own, because few reports need its 2.3 MB."""

from __future__ import annotations

from importlib import resources

from nnunet_flare.errors import InputError

PACKAGE = "nnunet_flare_niivue"
FILES = ("niivue.umd.js", "LICENSES.txt")


def viewer_files() -> dict[str, str]:
    """The viewer's files by their place in a report's folder.

    Raises:
        InputError: where the viewer is not installed.
    """
    try:
        package = resources.files(PACKAGE)
    except ModuleNotFoundError as error:
        raise InputError(
            "report --view3d: the viewer NiiVue is not installed. From a checkout of nnunet-flare: "
            "pip install ./packaging/niivue. Without --view3d the report does not need it"
        ) from error
    return {f"niivue/{name}": package.joinpath(name).read_text(encoding="utf-8") for name in FILES}
