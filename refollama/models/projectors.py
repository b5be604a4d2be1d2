"""From what the vision tower sees to what the language model reads: a picture becomes rows.

    (B, n², d_vision) ──► (B, rows, d_model)

Each has the names of its tensors, `mm.0` for one. `rows` is n² where each patch becomes a row, and
a quarter of that where four neighbours become one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from refollama.errors import UnsupportedModel
from refollama.models.clip import ClipConfig, Parts


class LinearProjector(nn.Module):
    """One matrix.  Source: Liu et al. 2023, "Visual Instruction Tuning", arXiv 2304.08485."""

    def __init__(self, config: ClipConfig, parts: Parts) -> None:
        super().__init__()
        self.width = parts.rows("mm.0")
        self.add_module("0", parts.linear("mm.0", self.width, config.d_model))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule("0")(x)

    def rows(self, n: int) -> int:
        """Of n × n patches, so many rows."""
        return n * n


class Mlp(LinearProjector):
    """Two matrices.  Source: LLaVA 1.5, arXiv 2310.03744, section 3.3."""

    def __init__(self, config: ClipConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        hidden, self.width = self.width, parts.rows("mm.2")
        self.add_module("2", parts.linear("mm.2", self.width, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule("2")(functional.gelu(super().forward(x)))


class MlpNorm(LinearProjector):
    """Two matrices with a norm behind each.  Source: Young et al. 2024, "Yi", arXiv 2403.04652."""

    def __init__(self, config: ClipConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        hidden, self.width = self.width, parts.rows("mm.3")
        self.add_module("1", parts.layer_norm("mm.1", hidden, config.norm_eps))
        self.add_module("3", parts.linear("mm.3", self.width, hidden))
        self.add_module("4", parts.layer_norm("mm.4", self.width, config.norm_eps))

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule("1")(super().forward(x))
        return self.get_submodule("4")(self.get_submodule("3")(functional.gelu(x)))


class Ldp(nn.Module):
    """A quarter of the rows: two matrices, then two blocks of light convolutions.

    Source: Chu et al. 2023, "MobileVLM", arXiv 2312.16886, section 3.4.
    """

    def __init__(self, config: ClipConfig, parts: Parts) -> None:
        super().__init__()
        mlp = "mm.model.mlp"
        self.width = M = parts.rows(f"{mlp}.3")
        matrices = {
            "1": parts.linear(f"{mlp}.1", parts.rows(f"{mlp}.1"), config.d_model),
            "3": parts.linear(f"{mlp}.3", M, parts.rows(f"{mlp}.1")),
        }
        blocks = {
            "1": LdpBlock(config, parts, "mm.model.mb_block.1.block", M, stride=1),
            "2": LdpBlock(config, parts, "mm.model.mb_block.2.block", M, stride=2),
        }
        self.model = nn.ModuleDict(
            {"mlp": nn.ModuleDict(matrices), "mb_block": nn.ModuleDict(blocks)}
        )

    def forward(self, x: Tensor) -> Tensor:
        part = self.model.get_submodule
        x = part("mlp.3")(functional.gelu(part("mlp.1")(x)))
        x = pictured(x)
        x = x + part("mb_block.1")(x)
        return part("mb_block.2")(x).flatten(2).mT

    def rows(self, n: int) -> int:
        """Of n × n patches, so many rows; the second block begins at every other patch."""
        return (n + 1) // 2 * ((n + 1) // 2)


class LdpBlock(nn.Module):
    """A convolution of each channel by itself, a gate for each channel, a matrix over channels.

    Shapes: (B, d_model, n, n) → (B, d_model, ⌈n / stride⌉, ⌈n / stride⌉).
    Source: Howard et al. 2019, "MobileNetV3", arXiv 1905.02244, section 5.
    """

    def __init__(
        self, config: ClipConfig, parts: Parts, name: str, width: int, *, stride: int
    ) -> None:
        super().__init__()
        self.stride, eps = stride, config.norm_eps
        squeezed = parts.rows(f"{name}.1.fc1")
        steps: Mapping[str, Mapping[str, nn.Module]] = {
            "0": {
                "0": parts.convolution(f"{name}.0.0", (width, 3, 3)),
                "1": parts.layer_norm(f"{name}.0.1", width, eps),
            },
            "1": {
                "fc1": parts.linear(f"{name}.1.fc1", squeezed, width),
                "fc2": parts.linear(f"{name}.1.fc2", width, squeezed),
            },
            "2": {
                "0": parts.linear(f"{name}.2.0", width, width),
                "1": parts.layer_norm(f"{name}.2.1", width, eps),
            },
        }
        self.block = nn.ModuleDict({at: nn.ModuleDict(dict(s)) for at, s in steps.items()})

    def forward(self, x: Tensor) -> Tensor:
        part = self.block.get_submodule
        x = part("0.0")(x, stride=self.stride, padding=1)
        x = functional.hardswish(part("0.1")(x.movedim(1, -1)))  # (B, n, n, d_model)
        x = x * self.gate(x.mean((1, 2)))[:, None, None]
        x = part("2.1")(part("2.0")(x))
        return x.movedim(-1, 1)

    def gate(self, x: Tensor) -> Tensor:
        """How much of each channel goes on, by what all places have in it: (B, d_model) → same.

        Source: Hu et al. 2018, "Squeeze-and-Excitation Networks", arXiv 1709.01507.
        """
        part = self.block.get_submodule
        return functional.hardsigmoid(part("1.fc2")(functional.relu(part("1.fc1")(x))))


class LdpV2(nn.Module):
    """A quarter of the rows: two matrices, the mean of four, and a convolution added to that.

    Source: Chu et al. 2024, "MobileVLM V2", arXiv 2402.03766, section 3.2.
    """

    def __init__(self, config: ClipConfig, parts: Parts) -> None:
        super().__init__()
        mlp = "mm.model.mlp"
        self.width = M = parts.rows(f"{mlp}.2")
        matrices = {
            "0": parts.linear(f"{mlp}.0", parts.rows(f"{mlp}.0"), config.d_model),
            "2": parts.linear(f"{mlp}.2", M, parts.rows(f"{mlp}.0")),
        }
        peg = {"0": parts.convolution("mm.model.peg.0", (M, 3, 3))}
        self.model = nn.ModuleDict({"mlp": nn.ModuleDict(matrices), "peg": nn.ModuleDict(peg)})

    def forward(self, x: Tensor) -> Tensor:
        part = self.model.get_submodule
        x = part("mlp.2")(functional.gelu(part("mlp.0")(x)))
        x = functional.avg_pool2d(pictured(x), 2)  # (B, d_model, n/2, n/2)
        x = x + part("peg.0")(x, padding=1)
        return x.flatten(2).mT

    def rows(self, n: int) -> int:
        """Of n × n patches, so many rows."""
        return (n // 2) * (n // 2)


def pictured(x: Tensor) -> Tensor:
    """Rows back to where they stand in the picture: (B, n², d_model) → (B, d_model, n, n)."""
    n = math.isqrt(x.shape[1])
    return x.mT.reshape(len(x), -1, n, n)


Projector = LinearProjector | Ldp | LdpV2
PROJECTORS: Mapping[str, type[Projector]] = {
    "linear": LinearProjector,
    "mlp": Mlp,
    "mlp_norm": MlpNorm,
    "ldp": Ldp,
    "ldpv2": LdpV2,
}


def projector(config: ClipConfig, parts: Parts, kind: str) -> Projector:
    """The projector of this `projector_type`.

    Files say "mlp" for three kinds, and those of 2023 say nothing: the tensors tell them apart.
    Raises: UnsupportedModel for a kind that is not built, FormatError for tensors that do not fit.
    """
    if kind not in PROJECTORS:
        known = ", ".join(PROJECTORS)
        raise UnsupportedModel(f"clip.projector_type is {kind!r}; supported are: {known}")
    if kind == "mlp" and not parts.has("mm.2"):
        kind = "mlp_norm" if parts.has("mm.3") else "linear"
    return PROJECTORS[kind](config, parts)
