"""Roles: which of the paper's networks a checkpoint stands for, and how such a network is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from asag_deploy.errors import ConfigError
from asag_training.network.config import DEFORMABLE, DecoderType
from asag_training.recipes import ABLATIONS, AT, RECIPES

Kind = Literal["network", "peer"]

REFERENCE = "asag-a-100"
"""The role of the ablation studies; the others' speed is measured beside it."""
_SMALL = ("scenes", "bccd")
"""Recipes for small data, which exist for each decoder as `-s` and `-d`."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """One of the paper's networks."""

    name: str
    about: str
    tables: tuple[str, ...]
    kind: Kind = "network"
    recipe: str = ""
    """The published recipe that trains it; for an ablation what comes after the recipe of `asag-a-100`."""
    decoder: DecoderType | None = None
    """What its decoder must be; None: any."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that a network of this role has."""
    stand_in: tuple[str, ...] = ()
    """Roles that take its place, in this order, where it is not given."""


_A: DecoderType = "adamixer"
_S: DecoderType = "sparse-rcnn"


def _ablation(table: str, name: str, **settings: Any) -> Role:
    return Role(
        settings=settings,
        name=f"{table.lower()}.{name}",
        about=f"ASAG-A, ablation: {ABLATIONS[name].about}",
        tables=(table,),
        recipe=f"{AT}{name}",
    )


_ROLES = (
    Role(
        name=REFERENCE,
        about="ASAG-A, 100 queries, 1x schedule: the network of the ablation studies",
        tables=("2", "5a", "5b", "5c", "5d", "8", "A-1"),
        recipe="asag-a-r50-100-1x",
        decoder=_A,
        stand_in=("asag-a-100-3x",),
    ),
    Role(
        name="asag-a-300",
        about="ASAG-A, 300 queries, 1x schedule",
        tables=("2",),
        recipe="asag-a-r50-300-1x",
        decoder=_A,
        stand_in=("asag-a-300-3x",),
    ),
    Role(
        name="asag-a-100-3x",
        about="ASAG-A, 100 queries, 3x schedule",
        tables=("3", "4", "5e"),
        recipe="asag-a-r50-100-3x",
        decoder=_A,
        stand_in=(REFERENCE,),
    ),
    Role(
        name="asag-a-300-3x",
        about="ASAG-A, 300 queries, 3x schedule",
        tables=("3", "4", "5e"),
        recipe="asag-a-r50-300-3x",
        decoder=_A,
        stand_in=("asag-a-300",),
    ),
    Role(
        name="asag-a-r101-300",
        about="ASAG-A on ResNet-101, 300 queries, 3x schedule",
        tables=("4",),
        recipe="asag-a-r101-300-3x",
        decoder=_A,
    ),
    Role(
        name="asag-s-100",
        about="ASAG-S, 100 queries, 3x schedule",
        tables=("3", "4"),
        recipe="asag-s-r50-100-3x",
        decoder=_S,
    ),
    Role(
        name="asag-s-300",
        about="ASAG-S, 300 queries, 3x schedule",
        tables=("3", "4"),
        recipe="asag-s-r50-300-3x",
        decoder=_S,
    ),
    Role(
        name="asag-d-300",
        about="ASAG-D, 300 queries, 3x schedule",
        tables=("3", "4"),
        recipe="asag-d-r50-300-3x",
        decoder=DEFORMABLE,
    ),
    Role(
        name="asag-s-crowdhuman",
        about="ASAG-S for persons in crowds",
        tables=("6",),
        recipe="asag-s-r50-crowdhuman",
        stand_in=("asag-s-300", "asag-s-100"),
    ),
    *(_ablation("5a", name) for name in ("fixed-queries", "no-query-weighting", "no-auxiliary-heads")),
    _ablation("5a", "keep-anchors", replace_anchors=False),
    *(_ablation("5c", f"patch-{size}", patch_size=size) for size in (10, 12, 18)),
    _ablation("8", "two-layers", decoder_layers=2),
    _ablation("A-1", "denoising"),
    Role(
        name="adamixer-6",
        about="AdaMixer of six layers, 100 learned queries",
        tables=("2", "4", "7", "8"),
        kind="peer",
        recipe="adamixer-6 --queries 100",
    ),
    Role(
        name="adamixer-6-300",
        about="AdaMixer of six layers, 300 learned queries",
        tables=("2", "4"),
        kind="peer",
        recipe="adamixer-6 --queries 300",
    ),
    Role(
        name="adamixer-6-query-weighting",
        about="AdaMixer of six layers, trained with Query Weighting",
        tables=("7",),
        kind="peer",
        recipe="adamixer-6 --queries 100 --query-weighting",
    ),
)

ROLES: dict[str, Role] = {role.name: role for role in _ROLES}
"""All roles by name."""


def check_role(name: str, kind: Kind) -> Role:
    """Return a role (ConfigError for one that does not exist, or that is of the other kind)."""
    role = ROLES.get(name)
    if role is None or role.kind != kind:
        names = ", ".join(each.name for each in _ROLES if each.kind == kind)
        raise ConfigError(f"unknown role '{name}' of a {kind}; the roles are {names}")
    return role


def base_recipe(variant: str | None) -> str:
    """Return the recipe that the network of the ablation studies is of, by its variant: the paper's if none
    of ours is."""
    plain = (variant or "").partition(AT)[0]
    return next(
        (name for name in (*_SMALL, "scenes-lite", "bccd-lite") if _variant_of(name) == plain),
        "asag-a-r50-100-1x",
    )


def how_to_make(role: Role, base: str) -> str:
    """Say what trains a network for a role, beside that of the recipe `base`, and how to give it."""
    if role.kind == "peer":
        like = base if RECIPES[base]().optimisation.batch_statistics else "scenes-lite"
        command = f"asag-bench train-peer {role.recipe} --like {like}"
        return f"needs a peer trained with `{command}`: give it as --peer {role.name}=DIR"
    recipe = f"{base}{role.recipe}" if role.recipe.startswith(AT) else role.recipe
    if base in _SMALL and not role.recipe.startswith(AT):
        suffix = {_S: "-s", DEFORMABLE: "-d"}.get(role.decoder or _A, "")
        recipe = f"{base}{suffix}" if role.name in (REFERENCE, "asag-s-100", "asag-d-300") else recipe
    return (
        f"needs a network trained with `asag-train --recipe {recipe}`: give it as --network {role.name}=FILE"
    )


def _variant_of(recipe: str) -> str:
    return RECIPES[recipe]().network.variant
