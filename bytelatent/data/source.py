"""One source's documents, again and again, divided among ranks."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import numpy as np

from bytelatent.credentials import masked
from bytelatent.data.pieces import Piece
from bytelatent.data.reading import CutBlock, Readings, Request
from bytelatent.data.settings import SourceSettings
from bytelatent.errors import UserError
from bytelatent.text import BadRow, BadRows, Stored, find_files


class Place(NamedTuple):
    """A block among all those of a source: places are in the order in which they are read."""

    epoch: int
    file: int  # in the order of the epoch
    block: int


class Left(NamedTuple):
    """A block that another rank has not read to its end, and the documents of it that were read."""

    place: Place
    item: int


class BadRowCount(NamedTuple):
    """How many bad rows and files were passed over in an epoch. Those of one epoch are those of all."""

    epoch: int
    count: int


class OtherFiles(UserError):
    """A position is of other files than those that are there now."""


class SourceReader:
    """The documents of one source that are one rank's.

    The files come in another order in each epoch, the same for all ranks; a file's blocks in turn belong to one rank
    after the other.

    Args:
        settings: the source.
        number: of the source, among the readings.
        readings: read the blocks.
        seed: of the order of the files.
        rank, world: this rank, of so many.
        check: complains about what is stored with the text.
        max_bad_rows: bad rows and files that are passed over in an epoch.
    """

    def __init__(
        self,
        settings: SourceSettings,
        number: int,
        readings: Readings,
        seed: int,
        rank: int = 0,
        world: int = 1,
        max_bad_rows: int = 0,
        check: Callable[[Stored, str], None] = lambda stored, file: None,
    ):
        self.settings, self.number, self.readings = settings, number, readings
        self.seed, self.rank, self.world = seed, rank, world
        self.check = check
        self._limit = BadRows(max_bad_rows, "data.max_bad_rows", f" of '{settings.path}'")
        self.files = find_files(settings.path)
        self._order = -1, np.arange(0)  # an epoch, and the numbers of the files in its order
        self._num_blocks_of: dict[str, int] = {}
        self.place = Place(0, 0, 0)  # this rank's block that is being read, or the first to be
        self.item = 0  # documents of the block that were read
        self.left: list[Left] = []  # blocks to read first, from before the number of ranks changed; [0] is being read
        self.bad_rows = BadRowCount(0, 0)
        self._restart()

    def __next__(self) -> list[Piece]:
        """The pieces of the next document."""
        while self._current is None or self.item >= len(self._current.documents):
            self._current = self._next_block()
        self.item += 1
        return self._current.documents[self.item - 1]

    def state_dict(self) -> dict[str, Any]:
        left = [[*left.place, left.item] for left in self.left]
        if left:
            left[0][-1] = self.item
        return {
            "files": masked(self.files),
            "place": list(self.place),
            "item": 0 if left else self.item,
            "left": left,
            "damaged": list(self.bad_rows),
        }

    def has_files_of(self, state: dict[str, Any]) -> bool:
        """Whether a state is of the files that are there now."""
        return masked(state["files"]) == masked(self.files)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a reader stood.

        Raises:
            OtherFiles: it read other files.
        """
        if not self.has_files_of(state):
            raise OtherFiles(
                f"data: the files of '{self.settings.path}' are not those of the checkpoint; put them back as they "
                "were, or go on with those that are there: data.allow_changed=true"
            )
        self.place = Place(*state["place"])
        self.left = [Left(Place(*place), item) for *place, item in state["left"]]
        self.item = self.left[0].item if self.left else state["item"]
        self.bad_rows = BadRowCount(*state["damaged"])
        self._restart()

    def unread(self, end: Place) -> list[Left]:
        """This rank's blocks before `end` that were not read to their end."""
        found = list(self.left)
        if found:
            found[0] = Left(found[0].place, self.item)
        item = 0 if found else self.item
        for place in itertools.takewhile(lambda place: place < end, self._own_places(self.place)):
            if place[:2] < end[:2] and place.block >= self._num_blocks(place):
                self._ended = place[:2]
            else:
                found.append(Left(place, item if place == self.place else 0))
        return found

    def _restart(self) -> None:
        """Begin to read at the first block left, or at `place`."""
        self._current: CutBlock | None = None
        self._ended: tuple[int, int] | None = None  # epoch and file whose last block was read
        self._asked: deque[tuple[Left, bool, Request]] = deque()
        self._turns = self._own_turns()
        self._barren_since = self.place.epoch  # no text was found from this epoch on

    def _own_turns(self) -> Iterator[tuple[Left, bool]]:
        """The blocks to read, from which document on, and whether another rank left them."""
        place, item = self.place, 0 if self.left else self.item
        for left in list(self.left):
            yield left, True
        for own in self._own_places(place):
            yield Left(own, item if own == place else 0), False

    def _own_places(self, first: Place) -> Iterator[Place]:
        """This rank's blocks from `first` on; of a file whose end is not known, until it is found (`_ended`).

        Raises:
            UserError: there are none.
        """
        idle = 0
        for epoch in itertools.count(first.epoch):
            idle += 1
            for file in range(first.file if epoch == first.epoch else 0, len(self.files)):
                begin = Place(epoch, file, first.block if (epoch, file) == first[:2] else 0)
                count = self._count(begin)
                block = begin.block + (self.rank - self._owner(begin)) % self.world
                while (count is None or block < count) and self._ended != (epoch, file):
                    idle = 0
                    yield Place(epoch, file, block)
                    block += self.world
            if idle > self.world:
                self._complain_of_nothing()

    def _next_block(self) -> CutBlock:
        while True:
            self._ask_ahead()
            (place, item), is_left, request = self._asked.popleft()
            if not is_left and self._ended == place[:2]:
                continue
            block = self._answer(place, request, count=item == 0)
            if is_left:
                while self.left[0].place != place:
                    self.left.pop(0)
                self.item = item
            elif block is None:
                self._ended = place[:2]
            else:
                self.left, self.place, self.item = [], place, item
            if block is not None and block.documents:
                self._barren_since = max(self._barren_since, place.epoch + 1)
                return block
            if place.epoch - self._barren_since > self.world:
                self._complain_of_nothing()

    def _ask_ahead(self) -> None:
        ahead = 1 if self.readings.workers == 0 else 2 * self.readings.workers
        while len(self._asked) < ahead:
            turn, is_left = next(self._turns)
            request = self.readings.ask(self.number, self._file(turn.place), turn.place.block)
            self._asked.append((turn, is_left, request))

    def _answer(self, place: Place, request: Request, count: bool) -> CutBlock | None:
        """The block; None where the file ends before it, or cannot be read from there on."""
        try:
            block = self.readings.answer(request)
        except BadRow as error:
            self._pass_over(error, place.epoch)
            return None
        if block is not None and block.stored is not None:
            self.check(block.stored, self._file(place))
        if block is not None and count:
            for error in block.bad_rows:
                self._pass_over(error, place.epoch)
        return block

    def _pass_over(self, error: BadRow, epoch: int) -> None:
        """Count a bad row or file.

        Raises:
            UserError: there are too many in this epoch.
        """
        if epoch != self.bad_rows.epoch:
            self.bad_rows = BadRowCount(epoch, 0)
        self._limit.count = self.bad_rows.count
        self.bad_rows = BadRowCount(epoch, self.bad_rows.count + 1)
        self._limit(error)

    def _complain_of_nothing(self) -> NoReturn:
        raise UserError(f"data: '{self.settings.path}' holds no text that can be read: every document is empty")

    def _owner(self, place: Place) -> int:
        """The rank that reads a block. In as many epochs as there are ranks, each rank reads every block once."""
        return (place.epoch + self._number(place) + place.block) % self.world

    def _file(self, place: Place) -> str:
        return self.files[self._number(place)]

    def _number(self, place: Place) -> int:
        if self._order[0] != place.epoch:
            order = np.random.default_rng([self.seed, place.epoch]).permutation(len(self.files))
            self._order = place.epoch, order
        return int(self._order[1][place.file])

    def _count(self, place: Place) -> int | None:
        try:
            return self.readings.readings[self.number].count(self._file(place))
        except BadRow:  # reading it will say so, too
            return None

    def _num_blocks(self, place: Place) -> int:
        """How many blocks a file holds, if need be by reading it."""
        file, reading = self._file(place), self.readings.readings[self.number]
        if file not in self._num_blocks_of:
            count = self._count(place)
            try:
                blocks = itertools.count() if count is None else ()
                count = count or next((index for index in blocks if reading(file, index) is None), 0)
            except BadRow:
                count = 0
            self._num_blocks_of[file] = count
        return self._num_blocks_of[file]
