"""Device memory and pinned host memory of the simulation: host memory that is never reused."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from support.simulated.rules import Book, Rule

ALIGNMENT = 256
# NaN in every floating-point type, and no token.
POISON = 0xFF


@dataclass
class Allocation:
    """A range of memory. It stays reserved after it is freed, so its address is never reused."""

    address: int
    size: int
    is_device: bool
    reserved: NDArray[np.uint8]
    is_live: bool = True


@dataclass
class Memory:
    """All allocations. capacity: bytes of device memory."""

    book: Book
    capacity: int = 1 << 30
    allocations: list[Allocation] = field(default_factory=list)

    def allocate(self, size: int, is_device: bool) -> int | None:
        """The address of new memory, filled with POISON; None when there is not enough."""
        if is_device and size > self.capacity - self.used():
            return None
        # Room around the range, so that neighbours never touch.
        reserved = np.full(size + 3 * ALIGNMENT, POISON, np.uint8)
        start = reserved.ctypes.data + ALIGNMENT
        address = -(-start // ALIGNMENT) * ALIGNMENT
        self.allocations.append(Allocation(address, size, is_device, reserved))
        return address

    def free(self, address: int, is_device: bool) -> None:
        found = self.find(address, 0)
        is_start = found is not None and (found.address, found.is_device) == (address, is_device)
        self.book.require(is_start, Rule.MEMORY_LIVE, f"free of {address:#x}")
        assert found is not None
        found.is_live = False
        found.reserved[:] = POISON

    def used(self) -> int:
        return sum(each.size for each in self.allocations if each.is_live and each.is_device)

    def find(self, address: int, size: int) -> Allocation | None:
        """The live allocation that holds the whole range."""
        for each in self.allocations:
            is_inside = each.address <= address and address + size <= each.address + each.size
            if each.is_live and is_inside:
                return each
        return None

    def require_live(self, address: int, size: int, what: str) -> None:
        if size:
            is_live = self.find(address, size) is not None
            self.book.require(is_live, Rule.MEMORY_LIVE, f"{what}: {size} bytes at {address:#x}")

    def is_known(self, address: int) -> bool:
        """Returns whether the address was ever allocated here; other memory is the host's."""
        return any(
            each.address <= address < each.address + max(each.size, 1) for each in self.allocations
        )


def view(address: int, size: int) -> NDArray[np.uint8]:
    """The bytes at an address."""
    if size == 0:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
