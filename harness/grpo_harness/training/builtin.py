"""The built-in recipes: files in the very format of a recipe of one's own. Loads no torch."""

from collections.abc import Mapping
from pathlib import Path

_FOLDER = Path(__file__).with_name("recipes")

BUILT_IN: Mapping[str, Path] = {
    name: _FOLDER / f"{name}.yaml" for name in ("tutorial", "nano", "collapse", "smoke", "learn")
}
"""Their files, by the names of the recipes."""


def path_of(recipe: str | Path) -> Path:
    """Return the file of a recipe: a built-in one by its name, or the .yaml file that is named.

    Raises ``ValueError`` with the known names.
    """
    if Path(recipe).suffix in (".yaml", ".yml"):
        return Path(recipe)
    if str(recipe) not in BUILT_IN:
        raise ValueError(
            f"no recipe {str(recipe)!r}: there are {', '.join(BUILT_IN)}, and files that end in "
            ".yaml"
        )
    return BUILT_IN[str(recipe)]
