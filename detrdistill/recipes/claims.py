"""Claims about DETRDistill: which rows of which tables they compare, by which measure and margin. No torch here."""

from dataclasses import dataclass

from detrdistill.recipes.rows import Row, Table
from detrdistill.recipes.tables import STRATEGIES

REPRODUCED_WITHIN, MARGIN = 0.5, 2.0  # AP; the margin is the smallest gain that matters
AP, HALFWAY, CHANGES = "AP", "AP halfway", "changes between stages, an image"
INSIDE = "weight inside objects, percent, image by image"  # of teachers; its interval is over images and not over seeds
# Every measure, and its smallest difference that matters. Boxes cover a quarter of a digit image: with 5 points more than that inside them,
# a cell in a box weighs a quarter more than one outside. Below, a mask is as good as the same weight everywhere.
MARGINS: dict[str, float | None] = {AP: MARGIN, HALFWAY: MARGIN, CHANGES: None, INSIDE: 5.0}
SECOND_HAND, OURS = "second hand", "ours"  # what others say of the paper, whose own words were not found; and questions of this kit


@dataclass(frozen=True)
class Claim:
    """One statement.

    Attributes:
        source: where the paper shows it; `SECOND_HAND` or `OURS` otherwise.
        ahead, than: names of rows; the claim is that the first has more of the measure.
        measure: AP; AP at the last evaluation of the first half of the schedule; how many queries an image change their object
            from stage to stage (Figure 7); or how much of a map's weight lies inside objects (Figure 4).
    """

    text: str
    source: str
    ahead: str
    than: str
    measure: str = AP


# Where a distilled row stands against a plain one, what that says, and where the paper says it.
HELPS = {
    "main_results": ("DETRDistill helps the student", "Table 3"),
    "encoder_decoder": ("DETRDistill helps students of fewer layers", "Table 4"),
    "self_distillation": ("DETRDistill helps where teacher and student have one backbone", SECOND_HAND),
    "light_backbones": ("DETRDistill helps students with lighter backbones", "Table 10"),
    "full_schedule": ("DETRDistill helps students that train as long as the teacher", "Table 3"),
}
AHEAD_OF_RIVALS = "DETRDistill is ahead of methods made for convolutional detectors"
NOT_COMPARED = "DETRDistill is ahead of methods that its paper does not compare with"
PAPER_FORM = "The paper's form is ahead of the released code's"
PASSES = Claim("A distilled student passes its teacher", "Table 3", "detrdistill", "teacher")
HELPS_ALONE, TOGETHER = "Each loss helps alone", "All losses together help most"
ALL, STAGEWISE, QUALITY = "logits + features + assignment", "positives and negatives, stage by stage", "query masks by quality (Eq. 9)"
CLAIMS = {
    "main_results": [
        *(Claim(AHEAD_OF_RIVALS, "Table 3", "detrdistill", rival) for rival in ("fgd", "mgd", "fitnet")),
        Claim("DETRDistill is ahead halfway", OURS, "detrdistill", "student", HALFWAY),
        Claim("DETRDistill's assignments are steadier", SECOND_HAND, "student", "detrdistill", CHANGES),
    ],
    "prior_methods": [Claim(AHEAD_OF_RIVALS, "Tables 1 and 3", "detrdistill at whole", f"{rival} at whole") for rival in ("fkd", "fgfi")],
    "stage_mapping": [Claim("Groups of stages teach best", OURS, "grouped", name) for name in STRATEGIES if name != "grouped"],
    "components": [
        *(Claim(HELPS_ALONE, "Table 7", part, "student") for part in ("logits", "features", "assignment")),
        *(Claim(TOGETHER, "Table 7", ALL, part) for part in ("logits", "features", "assignment", "logits + features")),
        *(Claim(TOGETHER, OURS, ALL, part) for part in ("logits + assignment", "features + assignment")),
    ],
    "logits": [
        Claim("Negatives help", SECOND_HAND, STAGEWISE, "positives, stage by stage"),
        Claim("Teaching every stage helps", SECOND_HAND, STAGEWISE, "positives and negatives, last stage"),
    ],
    "feature_masks": [
        Claim("Query masks help by their quality scores", SECOND_HAND, QUALITY, "query masks (Eq. 7)"),
        *(Claim("Query masks are better than others", OURS, QUALITY, name) for name in ("all cells alike (FitNet)", "ground-truth boxes")),
    ],
    "follow_ups": [Claim(NOT_COMPARED, OURS, "detrdistill", other) for other in ("kd_detr", "d3etr", "pkd", "cwd")],
    "where_to_look": [
        Claim("Query masks single out objects", "Figure 4", "queries", "area", INSIDE),
        Claim("Quality scores sharpen query masks", "Figure 4", "queries", "alike", INSIDE),
    ],
}


def claims_of(table: Table, detector: str) -> list[Claim]:
    """What the table's rows of one detector can decide."""
    rows = {row.name: row for row in table.rows if row.detector == detector}
    found = []
    whole = ""
    if table.name == "encoder_decoder":
        plain = {_layers(row): row for row in rows.values() if row.family == "student"}
        encoder, decoder = max(plain)
        whole = plain[encoder, decoder].name
        fewer_encoders = next((row for layers, row in plain.items() if layers[0] < encoder and layers[1] == decoder), None)
        fewer_decoders = next((row for layers, row in plain.items() if layers[0] == encoder and layers[1] < decoder), None)
        if fewer_encoders and fewer_decoders:
            source = "Table 4" if fewer_encoders.published else OURS
            found.append(Claim("The decoder's depth matters more than the encoder's", source, fewer_encoders.name, fewer_decoders.name))
    if table.name in HELPS:
        distilled = [row for row in rows.values() if row.family == "detrdistill" and row.baseline != whole]
        text, source = HELPS[table.name]
        # Without an encoder students are not the paper's.
        theirs = [source if row.published or table.name != "encoder_decoder" else OURS for row in distilled]
        found = [Claim(text, one, row.name, row.baseline) for one, row in zip(theirs, distilled, strict=True)] + found
    if table.name == "discrepancies":
        found += [Claim(PAPER_FORM, OURS, "detrdistill", row.name) for row in rows.values() if not row.family]
    if {"teacher", "detrdistill"} <= rows.keys() and table.name in ("main_results", "full_schedule"):
        schedules = {recipe.schedule for name in ("teacher", "detrdistill") for recipe in rows[name].recipes.values()}
        found += [PASSES] if len(schedules) == 1 else []  # a student that was stopped early cannot be asked for it
    return found + [claim for claim in CLAIMS.get(table.name, ()) if claim.ahead in rows and claim.than in rows]


def _layers(row: Row) -> tuple[int, int]:
    """Of encoder and decoder."""
    recipe = next(iter(row.recipes.values()))
    return recipe.encoder_layers, recipe.decoder_layers
