"""Box arithmetic that torchvision.ops does not have. Boxes are cxcywh relative to the image unless a name says xyxy."""

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import box_convert


def cxcywh_to_xyxy(boxes: Float[Tensor, "*any 4"]) -> Float[Tensor, "*any 4"]:
    return box_convert(boxes, "cxcywh", "xyxy")


def xyxy_to_cxcywh(boxes: Float[Tensor, "*any 4"]) -> Float[Tensor, "*any 4"]:
    return box_convert(boxes, "xyxy", "cxcywh")


def inverse_sigmoid(p: Float[Tensor, "*any"], eps: float = 1e-5) -> Float[Tensor, "*any"]:
    """Logit of `p`, finite also at 0 and 1: numerator and denominator are kept above `eps`, as the DETRs do."""
    p = p.clamp(0, 1)
    return torch.log(p.clamp(min=eps) / (1 - p).clamp(min=eps))


def add_reference(delta: Float[Tensor, "B Q 4"], reference: Float[Tensor, "B Q P"]) -> Float[Tensor, "B Q 4"]:
    """Un-activated boxes: the reference shifts the centre, and the size too if it has one."""
    if reference.shape[-1] == 4:
        return delta + reference
    return torch.cat((delta[..., :2] + reference, delta[..., 2:]), dim=-1)


def area(size: Float[Tensor, "*any 2"]) -> Float[Tensor, "*any"]:
    """Width times height."""
    if size.is_cuda:
        return size[..., 0] * size[..., 1]
    # Its backward pass looks for zeros, for which a host waits for its GPU. What is stored was made with it on CPUs; the other form's
    # backward pass rounds otherwise.
    return size.prod(-1)


def iou(a: Float[Tensor, "*#any 4"], b: Float[Tensor, "*#any 4"]) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
    """IoU and generalised IoU (Rezatofighi et al., CVPR 2019) of xyxy boxes, element by element with broadcasting.

    torchvision pairs two flat lists of boxes; stages, images, queries and targets at once need broadcasting. Two empty boxes
    have an IoU of 0.
    """
    tiny = torch.finfo(a.dtype).tiny
    size_a, size_b = (a[..., 2:] - a[..., :2]).clamp(min=0), (b[..., 2:] - b[..., :2]).clamp(min=0)
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0)
    overlap, hull = area(overlap), area(hull)
    union = area(size_a) + area(size_b) - overlap
    ratio = overlap / union.clamp(min=tiny)
    return ratio, ratio - (hull - union) / hull.clamp(min=tiny)
