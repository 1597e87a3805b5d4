"""What a detector makes of chosen images, as numpy arrays for the figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import pil_to_tensor

from detrdistill.boxes import cxcywh_to_xyxy, iou
from detrdistill.criterion import SetCriterion, target_cost
from detrdistill.data.coco import UNDECODABLE, Batch, CocoDataset, Sample, _rgb, collate
from detrdistill.distill.baselines.fgd import object_masks
from detrdistill.distill.baselines.fgfi import anchors, near_anchors
from detrdistill.distill.baselines.fkd import spatial_attention
from detrdistill.distill.features import quality_scores, quality_weights, query_masks
from detrdistill.errors import InputError
from detrdistill.experiments.methods import FGD, FGFI
from detrdistill.experiments.tables import TITLES
from detrdistill.figures.detections import Objects
from detrdistill.figures.quality import Mask
from detrdistill.matching import Problem, match
from detrdistill.models.outputs import DetectorOutput, Targets
from detrdistill.training.evaluation import detections


def pictures(dataset: CocoDataset, indices: Sequence[int]) -> list[np.ndarray]:
    """The images as they lie on disk, [H W 3] uint8."""
    return [np.asarray(dataset._load_image(dataset.ids[index])) for index in indices]


def ground_truth(dataset: CocoDataset, indices: Sequence[int]) -> list[Objects]:
    """The annotated objects of each image; crowds are left out."""
    found = []
    for index in indices:
        objects = [a for a in dataset.coco.imgToAnns[dataset.ids[index]] if not a["iscrowd"]]
        boxes = np.array([a["bbox"] for a in objects], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.append(Objects(boxes, [dataset.categories[dataset.index_of[a["category_id"]]].name for a in objects]))
    return found


def detect(detector: nn.Module, dataset: CocoDataset, indices: Sequence[int]) -> list[Objects]:
    """What the detector sees on each image, best first."""
    batch = collate([dataset[index] for index in indices])
    output, names = _forward(detector, batch), [category.name for category in dataset.categories]
    return [
        Objects(found["boxes"].numpy(), [names[label] for label in found["labels"].tolist()], found["scores"].numpy())
        for found in detections(output.logits[-1], output.boxes[-1], batch.original_sizes, detector.top)
    ]


@dataclass(frozen=True)
class QueryView:
    """The queries of one image at one decoder stage. N is the number of objects on the image.

    Attributes:
        masks: Eq. 7, [Q h w], on the finest level.
        quality: Eq. 8, [Q].
        names: the class each query is most sure of.
        boxes: [Q 4], x0 y0 x1 y1 in pixels of the image.
        weights: what Eq. 9 multiplies the squared feature error with, [h w], summed over all stages.
        unweighted: the same without quality scores (Eq. 7 alone), as if every query were perfect.
        scores: c of Eq. 8, [Q]: how sure each query is of its class.
        overlaps: IoU of each query's box with each object, [Q N].
        found: the object that the detector's own matching gives to each query, -1 for none, [Q].
        response: [Q N], how many times as strong a query's mask (cut at 0) is on an object's box as on average over the image.
    """

    masks: np.ndarray
    quality: np.ndarray
    names: list[str]
    boxes: np.ndarray
    weights: np.ndarray
    unweighted: np.ndarray
    scores: np.ndarray
    overlaps: np.ndarray
    found: np.ndarray
    response: np.ndarray

    def best(self, count: int) -> list[int]:
        """The queries of highest quality."""
        return np.argsort(-self.quality, kind="stable")[:count].tolist()

    def worst(self, count: int) -> list[int]:
        """The queries of lowest quality, the very lowest first."""
        return np.argsort(self.quality, kind="stable")[:count].tolist()

    def finders(self, least_score: float = 0.3) -> list[int]:
        """The queries that find the objects, one an object, best first.

        Where nothing is annotated, those whose score says that they found something.
        """
        found = self.found >= 0 if self.overlaps.shape[1] else self.scores >= least_score
        return [query for query in self.best(len(found)) if found[query]]

    def between(self) -> tuple[int, list[int]] | None:
        """The query related to two objects, and these two: the one whose second strongest response is the largest of all queries.

        None where the image has fewer than two objects.
        """
        if self.response.shape[1] < 2:
            return None
        query = int(np.sort(self.response, axis=1)[:, -2].argmax())
        return query, np.argsort(-self.response[query], kind="stable")[:2].tolist()


@dataclass(frozen=True)
class Scene:
    """An image and all that a detector said about it, once: what the figures show of it is computed from this.

    Attributes:
        image: [H W 3], uint8.
        truth: the annotated objects; none on an image of the user's.
        output: on the host.
        names: of the classes.
    """

    image: np.ndarray
    truth: Objects
    output: DetectorOutput
    targets: Targets
    names: Sequence[str]

    @property
    def stages(self) -> int:
        return len(self.output.logits)

    def queries(self, gamma: float, stage: int = -1) -> QueryView:
        """Masks, quality and boxes of the queries at one stage, counted from 0."""
        output, (height, width) = self.output, self.image.shape[:2]
        masks = query_masks(output.features[0], output.queries[stage])[0].numpy()
        corners, wanted = cxcywh_to_xyxy(output.boxes[stage, 0]), cxcywh_to_xyxy(self.targets.boxes[0])
        return QueryView(
            masks=masks,
            quality=self.quality(gamma)[stage],
            names=[self.names[label] for label in output.logits[stage, 0].argmax(-1).tolist()],
            boxes=(corners * torch.tensor([width, height, width, height])).numpy(),
            weights=self.weights(gamma).sum(0),
            unweighted=self.weights(None).sum(0),
            scores=output.logits[stage, 0].sigmoid().amax(-1).numpy(),
            overlaps=iou(corners[:, None], wanted[None])[0].numpy(),
            found=assigned(output, self.targets)[stage, 0],
            response=_response(masks, [coverage(box[None], masks.shape[1:]) for box in wanted.numpy()]),
        )

    def quality(self, gamma: float) -> np.ndarray:
        """Eq. 8, [S Q]."""
        return quality_scores(self.output.logits, self.output.boxes, self.targets, gamma)[:, 0].numpy()

    def weights(self, gamma: float | None) -> np.ndarray:
        """What Eq. 9 multiplies the squared feature error with at each stage, [S h w], finest level; None: without quality scores."""
        feature, queries = self.output.features[0], self.output.queries
        quality = torch.ones_like(queries[..., 0]) if gamma is None else torch.from_numpy(self.quality(gamma))[:, None]
        stages = zip(queries.split(1), quality.split(1), strict=True)
        return np.stack([quality_weights([feature], t, q)[0][0].numpy() for t, q in stages])


def look(detector: nn.Module, dataset: CocoDataset, image: int | Path) -> Scene:
    """A validation image by its number, or any image file, as a detector sees it. A file is prepared as the data set's images are.

    Raises:
        InputError: there is no such image, or it cannot be decoded; or the detector's features and queries differ in width.
    """
    if isinstance(image, Path):
        sample, pixels = read_image(image, dataset)
        truth = Objects(np.zeros((0, 4)), [])
    elif 0 <= image < len(dataset):
        sample, (pixels,), (truth,) = dataset[image], pictures(dataset, [image]), ground_truth(dataset, [image])
    else:
        raise InputError(f"image {image}: the data has images 0 to {len(dataset) - 1}")
    batch = collate([sample])
    output = _forward(detector, batch)
    if output.features[0].shape[1] != output.queries.shape[-1]:
        raise InputError(f"features have {output.features[0].shape[1]} channels, queries {output.queries.shape[-1]}: Eq. 7 multiplies them")
    return Scene(pixels, truth, output, batch.targets, [category.name for category in dataset.categories])


def read_image(path: Path, dataset: CocoDataset) -> tuple[Sample, np.ndarray]:
    """An image file as a sample without objects, and its pixels [H W 3], upright.

    Raises:
        InputError: it is missing or cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            image = _rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise InputError(f"image {path}: no such file") from None
    except UNDECODABLE as error:
        raise InputError(f"image {path}: cannot be decoded ({str(error)[:100]}); give another file") from None
    size = (image.height, image.width)
    nothing = {
        "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size),
        "labels": torch.zeros(0, dtype=torch.long),
    }
    pixels, _ = dataset.transforms(tv_tensors.Image(pil_to_tensor(image)), nothing)
    target = {"labels": nothing["labels"], "boxes": torch.zeros(0, 4)}
    where = {"image_id": -1, "size": tuple(pixels.shape[-2:]), "original_size": size}
    return (pixels.as_subclass(Tensor), target | where), np.asarray(image)


def query_panels(scene: Scene, gamma: float, *, stage: int = -1, found: int = 7, low: int = 3) -> list[Mask]:
    """Figure 4's masks: of queries that find objects, best first; of the one related to two objects; of those of lowest quality."""
    seen, panels, nothing = scene.queries(gamma, stage), [], scene.truth.boxes[:0]
    for query in seen.finders()[:found]:
        title = f"query {query} finds {seen.names[query]}\nc {seen.scores[query]:.2f}, q {seen.quality[query]:.2f}"
        objects = nothing if seen.found[query] < 0 else scene.truth.boxes[[seen.found[query]]]
        panels.append(Mask(seen.masks[query], title, objects, seen.boxes[[query]]))
    if pair := seen.between():
        query, both = pair
        strength = " and ".join(f"{seen.response[query, n]:.1f}" for n in both)
        panels.append(Mask(seen.masks[query], f"query {query}, two objects:\n{strength} x the mean", scene.truth.boxes[both]))
    for query in seen.worst(low):
        title = f"query {query}, low quality\nc {seen.scores[query]:.2f}, q {seen.quality[query]:.2f}"
        panels.append(Mask(seen.masks[query], title, nothing, seen.boxes[[query]]))
    return panels


def gamma_panels(scene: Scene, gammas: Sequence[float]) -> list[Mask]:
    """The weight of Eq. 9, summed over stages: every query counted alike, then under each gamma; with its share in the boxes."""
    titled = {"all queries alike": None} | {f"gamma {gamma:g}": gamma for gamma in gammas}
    return [_weight_panel(scene, scene.weights(gamma).sum(0), title) for title, gamma in titled.items()]


def stage_panels(scene: Scene, gamma: float) -> list[Mask]:
    """The weight of Eq. 9 of each decoder stage; with its share in the boxes."""
    return [_weight_panel(scene, weight, f"stage {k}") for k, weight in enumerate(scene.weights(gamma), start=1)]


def _weight_panel(scene: Scene, weight: np.ndarray, title: str) -> Mask:
    share = share_inside(weight, scene.truth, scene.image) if len(scene.truth.boxes) else float("nan")
    return Mask(weight, title if np.isnan(share) else f"{title}\n{100 * share:.0f} % inside", scene.truth.boxes)


def view_queries(detector: nn.Module, dataset: CocoDataset, index: int, *, gamma: float, stage: int = -1) -> QueryView:
    """Query masks, quality scores and selection masks of one image."""
    return look(detector, dataset, index).queries(gamma, stage)


def quality_of(detector: nn.Module, dataset: CocoDataset, indices: Sequence[int], gammas: Sequence[float]) -> np.ndarray:
    """Eq. 8 for all queries of many images at the last stage, [gammas, images x Q]."""
    found = []
    for some in _portions(indices):
        batch = collate([dataset[index] for index in some])
        output = _forward(detector, batch).at([-1])
        scores = [quality_scores(output.logits, output.boxes, batch.targets, gamma).flatten() for gamma in gammas]
        found.append(torch.stack(scores))
    return torch.cat(found, dim=1).numpy()


def coverage(boxes: np.ndarray, shape: tuple[int, int], points: int = 256) -> np.ndarray:
    """Which part of each cell of a map [h w] lies in any of the boxes, looked at in at least `points` x `points` points of the image.

    Args:
        boxes: [N 4], x0 y0 x1 y1, relative to the image, which the map covers.
    """
    times = -(-points // min(shape))
    y, x = ((np.arange(side * times) + 0.5) / (side * times) for side in shape)
    across = (x > boxes[:, 0, None]) & (x < boxes[:, 2, None])
    down = (y > boxes[:, 1, None]) & (y < boxes[:, 3, None])
    inside = (down[:, :, None] & across[:, None, :]).any(0)
    return inside.reshape(shape[0], times, shape[1], times).mean((1, 3))


# The maps of `where_to_look`, and what the figures call them.
REGIONS = {
    "fgd": "FGD: objects\nx attention",
    "fgfi": "FGFI:\nnear anchors",
    "cross-attention": "cross-\nattention",
    "gradient": "gradient of\ndetection loss",
    "queries": "query masks\n(Eq. 9)",
}


def plain_names() -> dict[str, str]:
    """The same names for a table's columns, and that of `shares`' last."""
    return {name: title.replace("-\n", "-").replace("\n", " ") for name, title in REGIONS.items()} | {"area": "area of the boxes"}


def where_to_look(detector: nn.Module, dataset: CocoDataset, index: int, *, gamma: float) -> dict[str, np.ndarray]:
    """Where on an image methods and detector put their weight: maps [h w] that sum to 1, by the names in `REGIONS`.

    - fgd: the foreground of FGD times the detector's attention over cells, on the maps before the encoder.
    - fgfi: the cells that FGFI imitates.
    - cross-attention: summed over queries and stages.
    - gradient: the norm over channels of dL_det / dF, F being what the decoder attends to.
    - queries: the weight of Eq. 9, summed over stages.

    The weight of coarser levels is spread over their cells' area and added to the finest's. A map without any weight stays 0.
    """
    batch = collate([dataset[index]]).to(next(detector.parameters()).device)
    with torch.no_grad():
        memory = detector.eval().encode(batch.pixels, batch.padding)
    output, gradients = _gradients(detector, memory, batch.targets)
    padding, fgd, fgfi = output.padding, FGD(), FGFI()
    attention = [spatial_attention(level, mask, fgd.temperature) for level, mask in zip(output.neck, padding, strict=True)]
    across = output.cross_attention.sum((0, 2)).split([mask[0].numel() for mask in padding], dim=1)
    quality = quality_scores(output.logits, output.boxes, batch.targets, gamma)
    found = {
        "fgd": [object_masks(batch.targets, mask)[0] * weight for mask, weight in zip(padding, attention, strict=True)],
        "fgfi": [count > 0 for count in near_anchors(batch.targets, padding, anchors(fgfi.scales, fgfi.ratios), fgfi.threshold)],
        "cross-attention": across,
        "gradient": [gradient.norm(dim=1) for gradient in gradients],
        "queries": quality_weights(output.features, output.queries, quality),
    }
    shapes = [mask.shape[1:] for mask in padding]
    return {name: spread([x.detach().cpu() for x in levels], shapes) for name, levels in found.items()}


def spread(levels: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Maps of several levels as one on the finest grid, the first, that sums to 1: a coarse cell's weight lies all over its area.

    0 everywhere if all levels are.

    Args:
        levels: of one image, in any shape that holds h x w numbers.
    """
    total = torch.zeros(shapes[0])
    for level, shape in zip(levels, shapes, strict=True):
        level = level.float().reshape(1, 1, *shape)
        enlarged = F.interpolate(level, size=total.shape, mode="nearest")[0, 0]
        total += enlarged * (level.sum() / enlarged.sum().clamp(min=1e-30))
    return (total / total.sum().clamp(min=1e-30)).numpy()


def share_inside(region: np.ndarray, truth: Objects, image: np.ndarray) -> float:
    """Part of a map's weight that lies in the ground-truth boxes; NaN for a map without weight."""
    height, width = image.shape[:2]
    inside = coverage(truth.boxes / (width, height, width, height), region.shape)
    return float((region * inside).sum() / region.sum()) if region.any() else float("nan")


def shares(detector: nn.Module, dataset: CocoDataset, indices: Sequence[int], *, gamma: float) -> dict[str, float]:
    """`share_inside` of every map, the mean over the images with objects; and of the boxes' own area, which weight without aim has."""
    found = []
    for index, truth in zip(indices, ground_truth(dataset, indices), strict=True):
        if len(truth.boxes):
            (image,), regions = pictures(dataset, [index]), where_to_look(detector, dataset, index, gamma=gamma)
            regions["area"] = np.ones_like(regions["queries"])
            found.append({name: share_inside(region, truth, image) for name, region in regions.items()})
    return {name: float(np.nanmean([one[name] for one in found])) if found else float("nan") for name in (*REGIONS, "area")}


def regions(
    detector: nn.Module, dataset: CocoDataset, indices: Sequence[int], *, gamma: float
) -> tuple[dict[str, list[np.ndarray]], dict[str, list[float]]]:
    """The maps of `where_to_look` and their shares inside boxes, an image each, by the titles that `REGIONS` gives them."""
    maps = [where_to_look(detector, dataset, index, gamma=gamma) for index in indices]
    seen = list(zip(maps, ground_truth(dataset, indices), pictures(dataset, indices), strict=True))
    by_title = {title: [one[name] for one in maps] for name, title in REGIONS.items()}
    return by_title, {title: [share_inside(one[name], truth, image) for one, truth, image in seen] for name, title in REGIONS.items()}


def assigned(output: DetectorOutput, targets: Targets) -> np.ndarray:
    """The object that each query is matched with at each stage, by the price of the detection loss; -1 for none. [S B Q]."""
    pairs = match({"objects": Problem(target_cost(output, targets), targets.counts)})["objects"]
    found = np.full(output.logits.shape[:3], -1)
    found[pairs.stage, pairs.image, pairs.query] = pairs.target
    return found


def assignments(detector: nn.Module, dataset: CocoDataset, indices: Sequence[int]) -> np.ndarray:
    """The same for many images of a data set, [S B Q]."""
    batches = (collate([dataset[index] for index in some]) for some in _portions(indices))
    return np.concatenate([assigned(_forward(detector, batch), batch.targets) for batch in batches], axis=1)


def instability(assigned: np.ndarray) -> dict[str, np.ndarray]:
    """How many queries and how many objects of an image change hands from each decoder stage to the next, [B S-1] each.

    A query changes if its object does, or if it gains or loses one: the score of DN-DETR (Li et al., CVPR 2022), there from epoch to
    epoch. An object changes if its query does.

    Args:
        assigned: of `assignments`, [S B Q].
    """
    numbers = np.arange(assigned.max(initial=-1) + 1)[:, None, None, None]
    holds = assigned == numbers  # [N S B Q]
    holder = np.where(holds.any(-1), holds.argmax(-1), -1)
    return {
        "queries": (assigned[1:] != assigned[:-1]).sum(-1).T,
        "objects": (holder[:, 1:] != holder[:, :-1]).sum(0).T,
    }


def instability_table(
    scores: Mapping[str, Sequence[Mapping[str, np.ndarray]]], dataset: CocoDataset, indices: Sequence[int]
) -> pd.DataFrame:
    """A line a setting, means over seeds: changed queries and objects an image over all steps, and the part of objects a step.

    Args:
        scores: for every setting a list over seeds of `instability` on the images `indices`.
    """
    objects, lines = sum(len(truth.boxes) for truth in ground_truth(dataset, indices)), []
    for setting, runs in scores.items():
        means = {f"{name} an image": np.mean([run[name].sum(1).mean() for run in runs]) for name in ("queries", "objects")}
        part = np.mean([run["objects"].sum() / max(objects * run["objects"].shape[1], 1) for run in runs])
        lines.append({"changed": TITLES.get(setting, setting), "seeds": len(runs), **means, "percent of objects a step": 100 * part})
    return pd.DataFrame(lines).set_index("changed").round(2)


def detect_with_transformers(folder: Path, images: Sequence[np.ndarray]) -> list[Objects] | None:
    """What a folder written by `export_hugging_face` sees on images [H W 3], by transformers' own code; every detection, best first.

    None where there is no such folder, or transformers is not installed.
    """
    if not (folder / "config.json").is_file() or find_spec("transformers") is None:
        return None
    from transformers import AutoImageProcessor, AutoModelForObjectDetection
    from transformers.utils import logging

    logging.disable_progress_bar()
    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModelForObjectDetection.from_pretrained(folder)
    found = []
    for image in images:
        with torch.no_grad():
            output = model.eval()(**processor(Image.fromarray(image), return_tensors="pt"))
        (seen,) = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[image.shape[:2]])
        labels = [model.config.id2label[label] for label in seen["labels"].tolist()]
        found.append(Objects(seen["boxes"].numpy(), labels, seen["scores"].numpy()))
    return found


def explore(detector: nn.Module, dataset: CocoDataset, image: int | Path, *, gamma: float, note: str = "") -> None:
    """Sliders for image, query, stage and gamma; below, the query's mask with its box, and the weight of Eq. 9. For a notebook.

    Raises:
        InputError: ipywidgets is not installed.
    """
    try:
        from ipywidgets import FloatSlider, IntSlider, interact
    except ImportError:
        raise InputError("interactive = True: needs ipywidgets; install it (pip install ipywidgets), or set it to False") from None
    from IPython.display import display

    from detrdistill.figures.quality import masks

    first = look(detector, dataset, image)
    cached = {image: first}

    def show(number: int, rank: int, stage: int, gamma: float) -> None:
        wanted = image if number < 0 else number
        if wanted not in cached:
            cached.clear()
            cached[wanted] = look(detector, dataset, wanted)
        scene = cached[wanted]
        seen = scene.queries(gamma, stage - 1)
        query = seen.best(rank)[-1]
        title = f"stage {stage}, query {query}: {seen.names[query]}\nc {seen.scores[query]:.2f}, q {seen.quality[query]:.2f}"
        panels = [
            Mask(seen.masks[query], title, scene.truth.boxes, seen.boxes[[query]]),
            Mask(scene.weights(gamma)[stage - 1], "weight of Eq. 9,\nall queries of this stage", scene.truth.boxes),
        ]
        display(masks(scene.image, panels, note, columns=3))

    lowest = -1 if isinstance(image, Path) else 0  # -1 is the user's own
    queries = first.output.logits.shape[2]
    interact(
        show,
        number=IntSlider(lowest if lowest else image, lowest, len(dataset) - 1, description="image", continuous_update=False),
        rank=IntSlider(1, 1, queries, description="query, by q", continuous_update=False),
        stage=IntSlider(first.stages, 1, first.stages, description="stage", continuous_update=False),
        gamma=FloatSlider(gamma, min=0, max=1, step=0.05, description="gamma", continuous_update=False),
    )


def _response(masks: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray:
    """[Q N]: the mean of each mask [Q h w], cut at 0, over each of N parts (shares of cells, [h w]), by its mean over the image."""
    positive = np.clip(masks, 0, None)
    mean = np.maximum(positive.mean((1, 2)), 1e-12)
    found = [(positive * part).sum((1, 2)) / max(part.sum(), 1e-12) / mean for part in parts]
    return np.stack(found, axis=1) if found else np.zeros((len(masks), 0))


def _portions(indices: Sequence[int], size: int = 16) -> list[Sequence[int]]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


@torch.no_grad()
def _forward(detector: nn.Module, batch: Batch) -> DetectorOutput:
    """The detector's own queries, decoded; the result on the host."""
    device = next(detector.parameters()).device
    memory = detector.eval().encode(batch.pixels.to(device), batch.padding.to(device))
    (output,) = detector.decode(memory, detector.queries(memory))
    maps = {name: [level.cpu() for level in getattr(output, name)] for name in ("features", "padding")}
    return DetectorOutput(output.logits.cpu(), output.boxes.cpu(), output.queries.cpu(), **maps, l1=output.l1)


def _gradients(detector: nn.Module, memory: Any, targets: Targets) -> tuple[DetectorOutput, list[Tensor]]:
    """What the detector says, and the gradient of its detection loss in what the decoder attends to, [B D cells] a level."""
    name = "tokens" if "tokens" in {field.name for field in fields(memory)} else "maps"
    held = getattr(memory, name)
    leaves = [x.detach().requires_grad_() for x in (held if name == "maps" else [held])]
    criterion = SetCriterion()
    with torch.enable_grad():
        memory = replace(memory, **{name: leaves if name == "maps" else leaves[0]})
        (output,) = detector.decode(memory, detector.queries(memory), attention=True)
        losses: Mapping[str, Tensor] = criterion(output, targets, match(criterion.problems(output, targets)))
        found = torch.autograd.grad(sum(value.sum() for value in losses.values()), leaves)
    if name == "maps":
        return output, [gradient.flatten(2) for gradient in found]
    return output, list(found[0].transpose(1, 2).split([mask[0].numel() for mask in output.padding], dim=2))
