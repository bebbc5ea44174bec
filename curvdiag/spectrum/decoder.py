"""A decoder of Llama's shape in numbers: its weights, the operations of its gradient, what its graphs hold.

How many numbers a graph holds for each token was found by counting the tensors of small models (Transformers' Llama in
float32, exact products with plain attention, gradients with fused attention); the tests count again, at other sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from curvdiag.operators.plan import GraphBytes
from curvdiag.spectrum.collectives import Shape, Units
from curvdiag.spectrum.scale import Work

FLOAT32 = 4
WALKING = 0.5
"""Bytes that walking a graph takes beside it and the product's parts, as a share of the graph's own."""


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder with gated feed-forward layers and an output layer of its own.

    Attributes:
        layers: Blocks.
        width: Of the residual stream.
        inner: Of the feed-forward layers.
        heads: Of attention.
        kv_heads: Heads of keys and values.
        vocabulary: Tokens that there are.
    """

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def kv_width(self) -> int:
        """Numbers of a token's keys, and of its values."""
        return self.width // self.heads * self.kv_heads

    def units(self) -> Units:
        """Each block a group of its own; embedding, last norm and output layer are the root's."""
        h, f, kv = self.width, self.inner, self.kv_width
        block: tuple[Shape, ...] = ((h, h), (kv, h), (kv, h), (h, h), (f, h), (f, h), (h, f), (h,), (h,))
        return Units(((self.vocabulary, h), (h,), (self.vocabulary, h)), (block,) * self.layers)

    def gradient_flops(self, length: int) -> int:
        """Operations of a gradient of one sequence: six for each weight of a matrix and token, and those of attention.

        Attention counts in full, also what a causal mask leaves out.
        """
        h, f = self.width, self.inner
        matrices = self.layers * (2 * h * h + 2 * h * self.kv_width + 3 * h * f) + self.vocabulary * h
        return length * (6 * matrices + 12 * self.layers * h * length)

    def activations(self, length: int) -> int:
        """Numbers that a gradient keeps from forward to backward, for one sequence; fused attention."""
        block = 8 * self.width + 4 * self.inner + 2 * self.kv_width + self.heads + 2
        return length * (self.layers * block + 3 * self.width + self.vocabulary)

    def checkpointed(self, length: int) -> int:
        """The same where each block keeps only its input, and is computed again when its turn comes."""
        one = Decoder(1, self.width, self.inner, self.heads, self.kv_heads, self.vocabulary)
        return length * self.layers * self.width + one.activations(length)

    def graph(self, length: int) -> int:
        """Numbers that the graph of a gradient keeps for exact products, for one sequence; plain attention."""
        block = 22 * self.width + 12 * self.inner + 2 * self.kv_width + 3 * self.heads * length
        return length * (self.layers * block + 7 * self.width + 3 * self.vocabulary)

    def work(self, sequences: int, length: int, *, batch: int = 1, checkpointing: bool = False) -> Work:
        """What a density over so many sequences is made of, in float32.

        Args:
            batch: Sequences in one pass of a plain gradient.
            checkpointing: Whether gradients compute each block again; a third more operations, less memory.
        """
        units = self.units()
        largest = self.width * max(self.vocabulary, self.inner)
        graph = float(FLOAT32 * self.graph(length))
        held = self.checkpointed(length) if checkpointing else self.activations(length)
        # Backward of the loss: the gradient of the outputs beside their logarithms.
        activations = float(FLOAT32 * (held + 2 * self.vocabulary * length))
        return Work(
            units.size,
            units.size,
            sequences,
            self.gradient_flops(length),
            GraphBytes(0.0, graph),
            GraphBytes(float(FLOAT32 * (units.size + 2 * largest)), WALKING * graph),
            GraphBytes(0.0, activations),
            units,
            batch,
            recomputed=checkpointing,
        )


LLAMA_1B = Decoder(22, 2048, 5632, 32, 4, 32000)
"""Shape of TinyLlama (Zhang et al. 2024): 1.10 billion weights."""
LLAMA_7B = Decoder(32, 4096, 11008, 32, 32, 32000)
LLAMA_70B = Decoder(80, 8192, 28672, 64, 8, 32000)
"""Shapes of Llama 2 (Touvron et al. 2023): 6.74 and 69.0 billion weights."""
