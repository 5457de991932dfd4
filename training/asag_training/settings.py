"""What training adds to a forward pass, as values."""

from __future__ import annotations

from dataclasses import dataclass

from asag_deploy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How patches are chosen and denoising queries are made while training.

    Raises ConfigError when a value makes no sense.
    """

    min_patches: int = 4
    """N_TP: the fewest patches that P4 and P3 are trained on per image (paper, section 4.2)."""
    target_patch_epochs: int = 1
    """Epochs, from the first, without generated patches: the anchors are not yet worth following."""
    denoising_queries: int = 200
    """Noised copies of the objects per image (paper, appendix B); 0 trains without denoising."""
    box_noise: float = 0.4
    """How far a noised box strays: centres by up to half of it, sizes by up to all of it, times the size."""

    def __post_init__(self) -> None:
        self._require(self.min_patches >= 1, "min_patches", "at least 1")
        self._require(self.target_patch_epochs >= 0, "target_patch_epochs", "0 or more")
        self._require(self.denoising_queries >= 0, "denoising_queries", "0 or more")
        # From 1 on a noised box could have no width left.
        self._require(0 <= self.box_noise < 1, "box_noise", "at least 0 and less than 1")

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            value = getattr(self, name)
            raise ConfigError(f"training setting {name} {value} is not possible: expected {expected}")
