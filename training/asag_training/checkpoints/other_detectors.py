"""Recognising by their tensors' names the networks of other projects, which no option makes readable."""

from __future__ import annotations

import re
from collections.abc import Iterable

_DETECTORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # The first whose patterns all occur among the names, so that the more special come first.
    ("RT-DETR or D-FINE", (r"decoder\.dec_bbox_head\.", r"encoder\.input_proj\.|decoder\.input_proj\.")),
    ("a Deformable DETR or DINO", (r"transformer\.level_embed", r"sampling_offsets")),
    ("RF-DETR or LW-DETR", (r"transformer\.(?:decoder|enc_output)", r"backbone\.0\.encoder\.")),
    ("DETR", (r"transformer\.encoder\.layers\.", r"query_embed\.weight")),
    ("AdaMixer", (r"sampling_n_mixing", r"init_content_features|rpn_head\.|roi_head\.")),
    ("Sparse R-CNN", (r"init_proposal_(?:features|boxes|bboxes)",)),
    ("Faster R-CNN", (r"roi_heads?\.", r"rpn(?:_head)?\.|proposal_generator\.")),
    (
        "RetinaNet or FCOS",
        (r"head\.(?:classification_head|cls_convs|cls_tower|bbox_tower)|bbox_head\.cls_convs",),
    ),
    ("a YOLO", (r"(?:^|\.)model\.\d+\.(?:conv|cv\d|m|cv)\.|backbone\.(?:dark|stage)\d|detect\.",)),
    ("a vision transformer", (r"blocks\.0\.attn\.qkv\.weight",)),
    ("a Swin transformer", (r"layers\.0\.blocks\.0\.attn\.qkv\.weight",)),
    ("a language model", (r"embed_tokens|lm_head|wte\.weight",)),
)


def other_detector(names: Iterable[str]) -> str | None:
    """Say whose network it is that has tensors of these names; None if nobody knows."""
    text = "\n".join(names)
    for detector, patterns in _DETECTORS:
        if all(re.search(pattern, text, re.MULTILINE) for pattern in patterns):
            return detector
    return None
