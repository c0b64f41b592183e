"""The same codec in PyTorch: for GPUs, for experiments, and as the oracle of the C training loop.

Encoder, codebook, straight-through estimator and decoder are ordinary modules, differentiated by
autograd and updated by torch.optim.Adam. :func:`train_torch` runs the very loop of
:func:`pocketllm.codec.train_codec` (same seed, data order, initialisation, schedule, revival) with
this module in place of the C kernels, so the losses of both agree to float tolerance.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .codec import Codec, TrainResult, train_codec

NORM_EPS = 1e-5
SEARCH_VALUES = 1 << 26  # distances held at a time


class Losses(NamedTuple):
    """loss = reconstruction + codebook_loss * commitment (0-d tensors); indices: (n,) int64."""

    loss: Tensor
    reconstruction: Tensor
    commitment: Tensor
    indices: Tensor


class Mlp(nn.Sequential):
    """``W2 gelu(W1 x + b1) + b2`` with exact GELU, d -> h -> d."""

    def __init__(self, subvector: int, hidden: int) -> None:
        super().__init__(nn.Linear(subvector, hidden), nn.GELU(), nn.Linear(hidden, subvector))


class Coder(nn.Module):
    """Three MLPs and the norm: the parts that encoder and decoder share.

    Args:
        subvector: d.
        hidden: h.
        norm: ``"rln"`` normalises over the whole row, ``"ln"`` over the sub-vector, ``"input"``
            not at all.
    """

    def __init__(self, subvector: int, hidden: int, norm: str) -> None:
        super().__init__()
        self.subvector = subvector
        self.norm = norm
        self.mlp = nn.ModuleList(Mlp(subvector, hidden) for _ in range(3))

    def normalise(self, x: Tensor) -> Tensor:
        """N of x (rows, L, d)."""
        if self.norm == "input":
            return x
        over = x.shape[1:] if self.norm == "rln" else x.shape[2:]
        return nn.functional.layer_norm(x, over, eps=NORM_EPS)

    def residual_pair(self, x: Tensor) -> Tensor:
        """x += mlp1(N(x)); x += mlp2(N(x)); N(x), on (rows, L, d)."""
        x = x + self.mlp[1](self.normalise(x))
        x = x + self.mlp[2](self.normalise(x))
        return self.normalise(x)

    def flat(self) -> Tensor:
        """The parameters in the package's flat layout."""
        return torch.cat([p.reshape(-1) for p in self.parameters()])

    def load_flat(self, values: Tensor) -> None:
        """Takes the parameters from the package's flat layout."""
        with torch.no_grad():
            parts = torch.split(values, [p.numel() for p in self.parameters()])
            for parameter, part in zip(self.parameters(), parts, strict=True):
                parameter.copy_(part.reshape(parameter.shape))


class Encoder(Coder):
    """Rows (rows, L*d) to latents of the same shape."""

    def forward(self, rows: Tensor) -> Tensor:
        x = rows.reshape(rows.shape[0], -1, self.subvector)
        return self.residual_pair(self.mlp[0](x)).reshape(rows.shape)


class Decoder(Coder):
    """Codewords laid out as rows (rows, L*d) to rows."""

    def forward(self, latents: Tensor) -> Tensor:
        x = latents.reshape(latents.shape[0], -1, self.subvector)
        return self.mlp[0](self.residual_pair(x)).reshape(latents.shape)


class TorchCodec(nn.Module):
    """Encoder, codebook and decoder of one codec.

    Args:
        subvector: d.
        codewords: K.
        hidden: h.
        norm: ``"rln"``, ``"ln"`` or ``"input"``.
    """

    def __init__(self, subvector: int, codewords: int, hidden: int, norm: str) -> None:
        super().__init__()
        self.encoder = Encoder(subvector, hidden, norm)
        self.decoder = Decoder(subvector, hidden, norm)
        self.codebook = nn.Parameter(torch.randn(codewords, subvector))
        self.hidden = hidden
        self.norm = norm

    @classmethod
    def from_arrays(
        cls,
        *,
        encoder: np.ndarray,
        codebook: np.ndarray,
        decoder: np.ndarray,
        hidden: int,
        norm: str,
        device: str | torch.device = "cpu",
    ) -> TorchCodec:
        """Build from flat parameters (3 (2 h d + h + d),) and a codebook (K, d), NumPy float32."""
        codec = cls(codebook.shape[1], codebook.shape[0], hidden, norm)
        with torch.no_grad():
            codec.codebook.copy_(torch.tensor(codebook))
        codec.encoder.load_flat(torch.tensor(encoder))
        codec.decoder.load_flat(torch.tensor(decoder))
        return codec.to(device)

    @classmethod
    def from_codec(cls, codec: Codec, *, device: str | torch.device = "cpu") -> TorchCodec:
        """The same codec as a module."""
        return cls.from_arrays(
            encoder=codec.encoder,
            codebook=codec.codebook,
            decoder=codec.decoder,
            hidden=codec.hidden,
            norm=codec.norm,
            device=device,
        )

    def to_codec(self) -> Codec:
        """The same codec as NumPy arrays."""
        encoder, codebook, decoder = (
            np.ascontiguousarray(t.detach().float().cpu().numpy())
            for t in (self.encoder.flat(), self.codebook, self.decoder.flat())
        )
        return Codec(codebook.shape[1], self.hidden, self.norm, encoder, decoder, codebook)

    def encode(self, rows: Tensor) -> Tensor:
        """Latents (rows, L*d) of rows (rows, L*d)."""
        return self.encoder(rows)

    def decode(self, latents: Tensor) -> Tensor:
        """Rows (rows, L*d) of codewords laid out as rows (rows, L*d)."""
        return self.decoder(latents)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Index (n,) int64 of the nearest codeword of each z (n, d); lowest index on ties."""
        offset = self.codebook.square().sum(1) / 2
        part = max(1, SEARCH_VALUES // len(offset))
        pieces = [(offset - piece @ self.codebook.T).argmin(1) for piece in z.split(part)]
        return torch.cat(pieces) if pieces else z.new_zeros(0, dtype=torch.int64)

    def losses(
        self, rows: Tensor, *, codebook_loss: float = 0.5, weight: Tensor | None = None
    ) -> Losses:
        """Losses of one straight-through step on rows (rows, L*d).

        weight: (rows, L*d) or (L*d,), weights of the squared reconstruction errors.
        """
        latents = self.encode(rows)
        z = latents.reshape(-1, self.codebook.shape[1])
        index = self.nearest(z)
        chosen = self.codebook[index].reshape(latents.shape)
        straight_through = latents + (chosen - latents).detach()
        # The value is the codeword itself, without the rounding of z + (c - z).
        exact = straight_through + (chosen - straight_through).detach()
        error = (self.decode(exact) - rows).square()
        reconstruction = (error if weight is None else weight * error).mean()
        commitment = (latents - chosen).square().mean()
        return Losses(
            reconstruction + codebook_loss * commitment, reconstruction, commitment, index
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Rows after encoding and decoding."""
        latents = self.encode(rows)
        index = self.nearest(latents.reshape(-1, self.codebook.shape[1]))
        return self.decode(self.codebook[index].reshape(latents.shape))

    def flat_gradients(self) -> dict[str, np.ndarray]:
        """Gradients of ``encoder``, ``codebook`` and ``decoder`` in the package's flat layout."""

        def flat(coder: Coder) -> np.ndarray:
            return torch.cat([_gradient(p).reshape(-1) for p in coder.parameters()]).cpu().numpy()

        return {
            "encoder": flat(self.encoder),
            "codebook": _gradient(self.codebook).cpu().numpy(),
            "decoder": flat(self.decoder),
        }


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class TorchEngine:
    """What :func:`pocketllm.codec.train_codec` drives, on a PyTorch device."""

    def __init__(self, codec: Codec, codebook_loss: float, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.module = TorchCodec.from_codec(codec, device=self.device)
        self.codebook_loss = codebook_loss
        self.optimizer = torch.optim.Adam(self.module.parameters(), eps=1e-8)

    def step(
        self, rows: np.ndarray, weight: np.ndarray | None, lr: float
    ) -> tuple[float, float, float, np.ndarray]:
        """One update; returns loss, reconstruction, commitment and the indices chosen."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        out = self.module.losses(
            self._tensor(rows),
            codebook_loss=self.codebook_loss,
            weight=None if weight is None else self._tensor(weight),
        )
        self.optimizer.zero_grad()
        out.loss.backward()
        self.optimizer.step()
        figures = (out.loss.item(), out.reconstruction.item(), out.commitment.item())
        return (*figures, out.indices.cpu().numpy().astype(np.int32))

    @torch.no_grad()
    def latents(self, rows: np.ndarray) -> np.ndarray:
        """Latents (rows, L*d)."""
        return self.module.encode(self._tensor(rows)).cpu().numpy()

    @torch.no_grad()
    def replace(self, index: np.ndarray, codewords: np.ndarray) -> None:
        """Puts new codewords in place of those at ``index`` and forgets their Adam state."""
        at = torch.as_tensor(index, device=self.device)
        self.module.codebook[at] = self._tensor(codewords)
        state: dict[str, Any] = self.optimizer.state[self.module.codebook]
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name][at] = 0.0

    def codec(self) -> Codec:
        """The codec as it is now."""
        return self.module.to_codec()

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)


def train_torch(
    rows: np.ndarray, *, device: str | torch.device = "cpu", **settings: Any
) -> TrainResult:
    """:func:`pocketllm.codec.train_codec` with this module and torch.optim.Adam inside.

    Args:
        rows: (R, L*d) float32, normalised.
        device: where the module runs.
        settings: as of train_codec.
    """

    def engine(codec: Codec, codebook_loss: float) -> TorchEngine:
        return TorchEngine(codec, codebook_loss, device)

    return train_codec(rows, engine=engine, **settings)
