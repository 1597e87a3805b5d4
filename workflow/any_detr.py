"""Tables of docs/any_detr.md on the families of transformers; `workflow/prose.py` puts them there."""

from pathlib import Path

from detrdistill.errors import InputError
from detrdistill.recipes.claims import HELPS
from detrdistill.recipes.families import FAMILIES
from detrdistill.recipes.methods import METHODS, DETRDistill, Method
from detrdistill.recipes.parts import Resize, Schedule
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.words import TITLES
from workflow.findings import REFERENCE, as_table, read, rows

PARITY = Path(__file__).resolve().parents[1] / "tests" / "any_detr" / "parity.csv"
IN_WORDS = {
    "last_stage": "last stage", "unpadded_stages": "all stages", "padded_stages": "all stages, padded",
    "fresh_copy": "own queries decoded anew",
    "second_group": "a second group", "own_loss": "own loss (relative)",
}  # fmt: skip
METHODS_SHOWN = {TITLES[name]: method() for name, method in METHODS.items()} | {
    "DETRDistill, released form": DETRDistill(variant="released"),
    "the same, `references=teacher`": DETRDistill(variant="released", references="teacher"),
}
FORMS = {
    "logits": "content from the encoder, a box as logits",
    "boxes": "learned content, a box",
    "anchors": "a learned box alone",
    "embeddings": "a learned embedding",
}


def shown_recipe(family: str) -> Recipe:
    """At the sizes of the family's configuration, on images whose sides every family can take."""
    return Recipe(detector=family, levels=1, schedule=Schedule(steps=1), resize=Resize(short=448, long=448, stretch=True))


def refused(recipe: Recipe, method: Method) -> bool:
    """Whether the recipe refuses the method, its teacher being of the same family."""
    try:
        recipe.replace(methods=(method,), teacher=recipe.replace(seed=1))
    except InputError:
        return True
    return False


def methods_of_families() -> str:
    """Which method runs on which family."""
    lines = []
    for title, method in METHODS_SHOWN.items():
        words = ["no" if refused(shown_recipe(family), method) else "yes" for family in FAMILIES]
        lines.append([title, *words, f"no {method.needs_own_layers}" if "no" in words else ""])
    return as_table(["Method", *(family.title for family in FAMILIES.values()), "Refused because"], lines)


def parity() -> str:
    """The largest differences from the models' own forward passes."""
    rows = read(PARITY)
    heading = ["Family", *(IN_WORDS[name] for name in rows[0] if name != "family")]
    return as_table(heading, [[FAMILIES[row["family"]].title, *(value for name, value in row.items() if name != "family")] for row in rows])


def families() -> str:
    """What differs between the families."""
    lines = [
        [
            family.title,
            f"`{name}`",
            FORMS[family.queries],
            {"last": "denoising", "first": "Group DETR", "all": "none"}[family.own],
            str(family.sides_of({})),
            "its encoder's input" if family.neck else "as `features`",
        ]
        for name, family in FAMILIES.items()
    ]
    return as_table(["Family", "`detector`", "Queries start from", "Training groups", "Sides: multiples of", "`neck` maps"], lines)


def families_measured() -> str:
    """What small detectors of two families learned on the digits: rows of preset mini's main results, and the verdict."""
    own = [row for row in rows("mini", "main_results") if row["Detector"] in {family.title for family in FAMILIES.values()}]
    if not own:
        return "Not measured yet."
    columns = ("Detector", "Setting", "AP", "Gain", "Status", "Seeds")
    said = [line for line in read(REFERENCE / "mini" / "tables" / "claims.csv") if line["claim"] == HELPS["main_results"][0]]
    titles = {row["Detector"] for row in own}
    verdicts = [f"{line['detector']}: *{line['status']}*" for line in said if line["detector"] in titles]
    return (
        as_table(columns, [[row[column] for column in columns] for row in own])
        + f'\n\n"{HELPS["main_results"][0]}", {"; ".join(verdicts)}.'
    )
