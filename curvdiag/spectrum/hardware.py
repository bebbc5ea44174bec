"""What a rank does in a second: GPUs by name with their makers' nominal figures, and the share that is assumed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from curvdiag.errors import ArgumentError

COMPUTE_SHARE = 0.6
"""Of the nominal float32 rate that a gradient is assumed to reach."""
LINK_SHARE = 0.8
"""Of a link's nominal rate that a collective is assumed to reach."""
MEMORY_SHARE = 0.8
"""Of the nominal memory rate that sums over long vectors are assumed to reach."""
MEMORY_LEFT = 0.9
"""Of the memory that tensors may take: the rest is the driver's, the libraries' buffers and what lies in between."""
LATENCY = 1e-5
"""Seconds of one step of a ring, where none is given."""


@dataclass(frozen=True)
class Rates:
    """What a rank reaches. None is unknown: the times that need it are then unknown as well.

    Attributes:
        flops: Floating-point operations a second, in the type of the products.
        bandwidth: Bytes a second that a rank of a ring sends while it receives as many: what nccl-tests call the bus
            bandwidth.
        latency: Seconds of one step of a ring; None is :data:`LATENCY`.
        memory_bandwidth: Bytes a second between the processor and its memory.
        memory: Bytes that tensors of a rank may take, those of the weights among them.
    """

    flops: float | None = None
    bandwidth: float | None = None
    latency: float | None = None
    memory_bandwidth: float | None = None
    memory: float | None = None

    def over(self, others: Rates) -> Rates:
        """These, and where one is unknown that of ``others``."""
        known = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(others, **known)


@dataclass(frozen=True)
class Hardware:
    """GPUs in nodes, a rank on each. All figures are nominal: those of the makers' data sheets.

    Attributes:
        name: As in :data:`HARDWARE`.
        flops: Float32 operations a second, without the tensor cores, whose formats are too coarse for differences.
        memory: Bytes.
        memory_bandwidth: Bytes a second.
        link: Bytes a second from one GPU to the others of its node; half of what is quoted for both directions.
        node: GPUs in a node.
        network: Bytes a second from a node into the network, for each GPU of the node.
    """

    name: str
    flops: float
    memory: float
    memory_bandwidth: float
    link: float
    node: int
    network: float

    def rates(self, ranks: int) -> Rates:
        """What a rank is assumed to reach among so many.

        Rings that pass through several nodes leave each node once, all its adapters carry one ring each, and the slower
        of links and adapters together decides.
        """
        wire = self.link if ranks <= self.node else min(self.link, self.node * self.network)
        return Rates(
            COMPUTE_SHARE * self.flops,
            LINK_SHARE * wire,
            LATENCY,
            MEMORY_SHARE * self.memory_bandwidth,
            MEMORY_LEFT * self.memory,
        )


HARDWARE = {
    one.name: one
    for one in (
        # NVLink 600 GB/s and 900 GB/s are quoted for both directions; adapters of 200 and 400 Gb/s, one for each GPU.
        Hardware("A100", 19.5e12, 80e9, 2.04e12, 300e9, 8, 25e9),
        Hardware("H100", 67e12, 80e9, 3.35e12, 450e9, 8, 50e9),
        Hardware("H200", 67e12, 141e9, 4.8e12, 450e9, 8, 50e9),
    )
}
"""SXM modules in nodes of eight: A100 (80 GB), H100 and H200, each GPU with an InfiniBand adapter of its own."""


def hardware_of(wanted: str | Hardware) -> Hardware:
    """The named hardware, or what was given.

    Raises:
        ArgumentError: The name is not known.
    """
    if isinstance(wanted, Hardware):
        return wanted
    if wanted not in HARDWARE:
        known = ", ".join(map(repr, HARDWARE))
        raise ArgumentError(
            f"hardware is one of {known} or a Hardware, not {wanted!r}; without it give flops= and bandwidth="
        )
    return HARDWARE[wanted]
