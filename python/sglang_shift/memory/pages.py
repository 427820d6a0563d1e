"""Pages of a device's memory, and the addresses at which they are mapped.

A range of addresses is reserved once, and tensors lie in it. Pages are mapped into the range and unmapped again, one by
one. So memory moves from one tensor to another, and no tensor changes its address.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch

PAGE_BYTES = 2 << 20
"""The size of a page. GPUs map memory in pieces of 2 MiB."""


class Device(ABC):
    """The memory that one rank has of a device, as pages of one size.

    Attributes:
        page_bytes: The size of a page.
        stock: The pages that are mapped nowhere. They keep their bytes.
        count: The number of all pages, mapped or not.
    """

    def __init__(self, page_bytes: int = PAGE_BYTES) -> None:
        self.page_bytes = page_bytes
        self.stock: list[int] = []
        self.count = 0

    def pages(self, nbytes: int) -> int:
        """How many pages hold ``nbytes`` bytes."""
        return -(-nbytes // self.page_bytes)

    def take(self, count: int) -> None:
        """Take pages from the system into the stock.

        Raises:
            MemoryError: the system does not have so many. Then none is taken.
        """
        taken: list[int] = []
        try:
            for _ in range(count):
                taken.append(self._create())
        except MemoryError:
            for page in taken:
                self._destroy(page)
            raise
        self.stock += taken[::-1]  # the first page is mapped first, so neighbours stay neighbours
        self.count += count

    def give_back(self, count: int) -> None:
        """Give pages of the stock back to the system. Their bytes are lost.

        Raises:
            MemoryError: the stock does not have so many. Then all stay.
        """
        self._check_stock(count)
        for _ in range(count):
            self._destroy(self.stock.pop())
            self.count -= 1

    @abstractmethod
    def reserve(self, nbytes: int) -> Reservation:
        """Reserve addresses for ``nbytes`` bytes. They take no memory."""

    def _check_stock(self, count: int) -> None:
        if count > len(self.stock):
            raise MemoryError(f"{count} pages are needed, and {len(self.stock)} pages are mapped nowhere")

    @abstractmethod
    def _create(self) -> int:
        """A new page. Raises MemoryError if there is none."""

    @abstractmethod
    def _destroy(self, page: int) -> None: ...


class Reservation(ABC):
    """A range of addresses, for as long as the process lives. To touch an address without a page is a fault.

    Attributes:
        device: The device whose pages are mapped here.
        address: The first address, a multiple of the size of a page.
        count: The number of places for pages.
        mapped: The page at each place that has one.
    """

    address: int

    def __init__(self, device: Device, nbytes: int) -> None:
        self.device, self.count = device, device.pages(nbytes)
        self.mapped: dict[int, int] = {}

    def map(self, places: Iterable[int]) -> None:
        """Map pages of the stock at these places.

        Raises:
            MemoryError: the stock has too few pages. Then nothing is mapped.
            ValueError: a place is outside of the range, or has a page already. Then nothing is mapped.
        """
        places = self._checked(places, mapped=False)
        stock = self.device.stock
        self.device._check_stock(len(places))
        for place in places:
            self._map(place, stock[-1])
            self.mapped[place] = stock.pop()

    def unmap(self, places: Iterable[int]) -> None:
        """Put the pages at these places into the stock. No kernel may use them any more.

        Raises:
            ValueError: a place has no page. Then nothing is unmapped.
        """
        for place in self._checked(places, mapped=True):
            self._unmap(place)
            self.device.stock.append(self.mapped.pop(place))

    @abstractmethod
    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor at the first address. It may be larger than what is mapped, but not than the range."""

    def _checked(self, places: Iterable[int], *, mapped: bool) -> list[int]:
        unique = list(dict.fromkeys(places))
        wrong = [place for place in unique if place not in range(self.count) or (place in self.mapped) is not mapped]
        if wrong:
            state = "has no page" if mapped else "has a page already"
            raise ValueError(f"place {wrong[0]} of a range of {self.count} pages is outside of it, or {state}")
        return unique

    @abstractmethod
    def _map(self, place: int, page: int) -> None: ...

    @abstractmethod
    def _unmap(self, place: int) -> None: ...
