"""Figure 4: the masks and quality scores of a detector's queries on an image, as numpy arrays and panels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import pil_to_tensor

from detrdistill.analysis.detections import forward, ground_truth, pictures, portions
from detrdistill.analysis.where_to_look import coverage, share_inside
from detrdistill.boxes import cxcywh_to_xyxy, iou
from detrdistill.criterion import matched_objects
from detrdistill.data.coco import CocoDataset, Sample, collate
from detrdistill.data.images import open_image, to_rgb
from detrdistill.distill.features import quality_scores, quality_weights, query_masks
from detrdistill.errors import InputError
from detrdistill.figures.detections import Objects
from detrdistill.figures.quality import Mask
from detrdistill.models.outputs import DetectorOutput, Targets


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
            found=matched_objects(output, self.targets)[stage, 0].numpy(),
            response=mask_response(masks, [coverage(box[None], masks.shape[1:]) for box in wanted.numpy()]),
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
    output = forward(detector, batch)
    if output.features[0].shape[1] != output.queries.shape[-1]:
        raise InputError(f"features have {output.features[0].shape[1]} channels, queries {output.queries.shape[-1]}: Eq. 7 multiplies them")
    return Scene(pixels, truth, output, batch.targets, [category.name for category in dataset.categories])


def read_image(path: Path, dataset: CocoDataset) -> tuple[Sample, np.ndarray]:
    """An image file as a sample without objects, and its pixels [H W 3], upright.

    Raises:
        InputError: it is missing or cannot be decoded.
    """
    with open_image(path) as file:
        image = to_rgb(ImageOps.exif_transpose(file))
    size = (image.height, image.width)
    nothing = {
        "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size),
        "labels": torch.zeros(0, dtype=torch.long),
    }
    pixels, _ = dataset.transforms(tv_tensors.Image(pil_to_tensor(image)), nothing)
    target = {"labels": nothing["labels"], "boxes": torch.zeros(0, 4)}
    where = {"image_id": -1, "original_size": size}
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
    for some in portions(indices):
        batch = collate([dataset[index] for index in some])
        output = forward(detector, batch).at([-1])
        scores = [quality_scores(output.logits, output.boxes, batch.targets, gamma).flatten() for gamma in gammas]
        found.append(torch.stack(scores))
    return torch.cat(found, dim=1).numpy()


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
            _weight_panel(scene, scene.weights(gamma)[stage - 1], f"Eq. 9, stage {stage}, all queries"),
        ]
        display(masks(scene.image, panels, note, columns=3))

    lowest = -1 if isinstance(image, Path) else 0  # -1 is the user's own
    queries = first.output.logits.shape[2]
    alike = {"continuous_update": False, "layout": {"width": "600px"}}  # wide enough to reach every image
    interact(
        show,
        number=IntSlider(lowest if lowest else image, lowest, len(dataset) - 1, description="image", **alike),
        rank=IntSlider(1, 1, queries, description="query, by q", **alike),
        stage=IntSlider(first.stages, 1, first.stages, description="stage", **alike),
        gamma=FloatSlider(gamma, min=0, max=1, step=0.05, description="gamma", **alike),
    )


def mask_response(masks: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray:
    """[Q N]: the mean of each mask [Q h w], cut at 0, over each of N parts (shares of cells, [h w]), by its mean over the image."""
    positive = np.clip(masks, 0, None)
    mean = np.maximum(positive.mean((1, 2)), 1e-12)
    found = [(positive * part).sum((1, 2)) / max(part.sum(), 1e-12) / mean for part in parts]
    return np.stack(found, axis=1) if found else np.zeros((len(masks), 0))
