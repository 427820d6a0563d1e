"""Names the instances that the ranks of one world can form: aligned groups of neighbours of a power of two of ranks.

A *level* is the number of ranks of an instance. At level 1 each rank serves alone, as a replica does. At level P all
ranks are one instance. Everything here follows from numbers, so every process computes the same without messages.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Instance:
    """Neighbouring ranks that serve as one.

    Attributes:
        level: The number of ranks, a power of two.
        index: The number of this instance among those of its level. Its first rank is ``index * level``.

    Raises:
        ValueError: the level is not a power of two, or the index is negative.
    """

    level: int
    index: int

    def __post_init__(self) -> None:
        _check_power_of_two(self.level, "a level")
        if self.index < 0:
            raise ValueError(f"the index of an instance is {self.index}, but it must not be negative")

    @property
    def ranks(self) -> range:
        """The ranks of this instance, as ranks of the world."""
        return range(self.leader, self.leader + self.level)

    @property
    def leader(self) -> int:
        """The rank that gets the requests of this instance and sends its answers: its first rank."""
        return self.index * self.level

    def place(self, rank: int) -> int:
        """The number of a rank of the world among the ranks of this instance, which is its TP rank.

        Raises:
            ValueError: the rank is not in this instance.
        """
        if rank not in self.ranks:
            raise ValueError(f"rank {rank} is not in {self}")
        return rank - self.leader

    def merged(self, level: int) -> Instance:
        """The instance of a higher level that has the ranks of this instance.

        Raises:
            ValueError: ``level`` is lower than the level of this instance.
        """
        if level < self.level:
            raise ValueError(f"{self} cannot merge into an instance of level {level}, which is lower; split it instead")
        return Instance(level, self.leader // level)

    def parts(self, level: int) -> tuple[Instance, ...]:
        """The instances of a lower level into which this instance splits, in the order of their ranks.

        Raises:
            ValueError: ``level`` is higher than the level of this instance.
        """
        if level > self.level:
            raise ValueError(f"{self} cannot split into instances of level {level}, which is higher; merge it instead")
        count = self.level // level
        return tuple(Instance(level, self.index * count + number) for number in range(count))

    def neighbours(self, level: int) -> tuple[Instance, ...]:
        """The other instances of this level with which this instance merges into one of the higher ``level``."""
        return tuple(part for part in self.merged(level).parts(self.level) if part != self)

    def __str__(self) -> str:
        return f"the instance of ranks {self.leader} to {self.leader + self.level - 1}"


@dataclass(frozen=True)
class Levels:
    """The levels that a world of ranks may use.

    Attributes:
        sizes: The levels in ascending order, all powers of two. The last one is P, the number of ranks of the world.

    Raises:
        ValueError: there is no level, they are not ascending, or one is not a power of two.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        for size in self.sizes:
            _check_power_of_two(size, "a level")
        if not self.sizes or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"levels must be given in ascending order, and at least one of them, not as {self.sizes}")

    @classmethod
    def between(cls, lowest: int, world_size: int) -> Levels:
        """All levels from ``lowest`` to the whole world.

        Args:
            lowest: The ranks of an instance that cannot split further.
            world_size: P, the number of ranks of the world.

        Raises:
            ValueError: one of them is not a power of two, or ``lowest`` is larger than the world.
        """
        _check_power_of_two(lowest, "the lowest level")
        _check_power_of_two(world_size, "the number of ranks")
        if lowest > world_size:
            raise ValueError(f"an instance of {lowest} ranks needs more ranks than the {world_size} of the world")
        exponents = range(lowest.bit_length() - 1, world_size.bit_length())
        return cls(tuple(2**exponent for exponent in exponents))

    @classmethod
    def of_flags(cls, world_size: int, instances: int, merge_levels: str = "") -> Levels:
        """The levels that the flags ask for.

        Args:
            world_size: P, the number of ranks of the world (``--tp-size``).
            instances: N, the instances at the start (``--instances``). N divides P.
            merge_levels: The ranks of merged instances, with commas (``--merge-levels``). Empty: all powers of two.

        Raises:
            ValueError: a level is not a power of two between P/N and P.
        """
        every = cls.between(world_size // instances, world_size)
        if not merge_levels:
            return every
        try:
            chosen = {int(text) for text in merge_levels.split(",")}
        except ValueError:
            raise ValueError(f"{merge_levels!r} is not a list of numbers with commas between them") from None
        if wrong := sorted(chosen - set(every.sizes)):
            raise ValueError(f"{wrong[0]} is not one of {', '.join(map(str, every.sizes))}")
        return cls(tuple(sorted(chosen | {every.lowest, world_size})))

    @property
    def world_size(self) -> int:
        """P, the number of ranks of the world."""
        return self.sizes[-1]

    @property
    def lowest(self) -> int:
        """The level of the smallest instances."""
        return self.sizes[0]

    def instances(self, level: int) -> tuple[Instance, ...]:
        """The instances of a level, which have all ranks of the world.

        Raises:
            ValueError: the world does not use this level.
        """
        self.check(level)
        return Instance(self.world_size, 0).parts(level)

    def instance_of(self, rank: int, level: int) -> Instance:
        """The instance of a level that has this rank.

        Raises:
            ValueError: the world does not use this level, or it has no such rank.
        """
        self.check(level)
        if rank not in range(self.world_size):
            raise ValueError(f"there is no rank {rank} in a world of {self.world_size}")
        return Instance(level, rank // level)

    def check(self, level: int) -> None:
        """Check that the world uses a level.

        Raises:
            ValueError: it does not.
        """
        if level not in self.sizes:
            raise ValueError(f"level {level} is not one of the levels of this world, which are {self.sizes}")


def _check_power_of_two(number: int, what: str) -> None:
    if number < 1 or number & (number - 1):
        raise ValueError(f"{what} is {number}, but it must be a power of two")
