"""One source's documents, again and again, divided among ranks."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import numpy as np

from bytelatent.credentials import masked
from bytelatent.data.packing import Piece, warn_of_cuts
from bytelatent.data.reading import Begun, CutBlock, ReaderPool
from bytelatent.data.settings import SourceSettings
from bytelatent.errors import UserError
from bytelatent.text import BadRow, BadRows, Stored, find_files


class BlockPosition(NamedTuple):
    """A block of a source. Positions are in the order in which blocks are read."""

    epoch: int
    file: int  # in the order of the epoch
    block: int


class PartlyRead(NamedTuple):
    """A block that was not read to its end, and how many of its documents were read."""

    position: BlockPosition
    item: int


class FilesChanged(UserError):
    """The saved state refers to other files than those that exist now."""


class SourceReader:
    """One rank's share of the documents of a source.

    The files come in another order in each epoch, the same for all ranks; a file's blocks in turn belong to one rank
    after the other.

    Args:
        settings: the source.
        number: of the source, among the readers of the pool.
        pool: reads the blocks.
        seed: shuffles the files.
        max_bad_rows: bad rows and files that are passed over in an epoch.
        check: raises where what is stored with the text does not fit.
    """

    def __init__(
        self,
        settings: SourceSettings,
        number: int,
        pool: ReaderPool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        max_bad_rows: int = 0,
        check: Callable[[Stored, str], None] = lambda stored, file: None,
    ):
        self.settings, self.number, self.pool = settings, number, pool
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.check = check
        self.bad_rows = BadRows(max_bad_rows, "data.max_bad_rows", f" of '{settings.path}'")
        self.bad_epoch = 0  # whose bad rows are counted; those of one epoch are those of all
        self.files = find_files(settings.path)
        self._order = -1, np.arange(0)  # an epoch, and the numbers of the files in its order
        self._num_blocks_of: dict[str, int] = {}
        self.position = BlockPosition(0, 0, 0)  # this rank's block that is being read, or the first to be
        self.item = 0  # documents of the block that were read
        # Blocks to read first, from before the number of ranks changed; the first one is being read.
        self.left: list[PartlyRead] = []
        self._restart()

    def __next__(self) -> list[Piece]:
        """The pieces of the next document."""
        while self._current is None or self.item >= len(self._current.documents):
            self._current = self._next_block()
        self.item += 1
        return self._current.documents[self.item - 1]

    def state_dict(self) -> dict[str, Any]:
        return {
            "files": masked(self.files),
            "place": list(self.position),
            "item": 0 if self.left else self.item,
            "left": [[*left.position, left.item] for left in self._left_now()],
            "damaged": [self.bad_epoch, self.bad_rows.count],
        }

    def has_files_of(self, state: dict[str, Any]) -> bool:
        """Whether a state is of the files that are there now."""
        return masked(state["files"]) == masked(self.files)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where a reader was.

        Raises:
            FilesChanged: the state is of other files.
        """
        if not self.has_files_of(state):
            raise FilesChanged(
                f"data: the files of '{self.settings.path}' are not those of the checkpoint; put them back as they "
                "were, or train on those that are there: data.allow_changed=true"
            )
        self.position = BlockPosition(*state["place"])
        self.left = [PartlyRead(BlockPosition(*position), item) for *position, item in state["left"]]
        self.item = self.left[0].item if self.left else state["item"]
        self.bad_epoch, self.bad_rows.count = state["damaged"]
        self._restart()

    def end(self) -> BlockPosition:
        """The position up to which this rank may have read blocks."""
        is_begun = self.item > 0 and not self.left
        return self.position._replace(block=self.position.block + 1) if is_begun else self.position

    def unfinished(self, end: BlockPosition) -> list[PartlyRead]:
        """This rank's blocks before `end` that were not read to their end."""
        found, item = self._left_now(), 0 if self.left else self.item
        for position in itertools.takewhile(lambda position: position < end, self._own_positions(self.position)):
            if position[:2] < end[:2] and position.block >= self._num_blocks(position):
                self._ended = position[:2]
            else:
                found.append(PartlyRead(position, item if position == self.position else 0))
        return found

    def _left_now(self) -> list[PartlyRead]:
        """The blocks left by other ranks, with what was read of the first one since."""
        return [left._replace(item=self.item) if left is self.left[0] else left for left in self.left]

    def _restart(self) -> None:
        """Begin at the first block left, or at `position`."""
        self._current: CutBlock | None = None
        self._ended: tuple[int, int] | None = None  # epoch and file whose last block was read
        self._asked: deque[tuple[PartlyRead, bool, Begun]] = deque()
        self._to_read = self._own_blocks()
        self._no_text_since = self.position.epoch  # no text was found since this epoch

    def _own_blocks(self) -> Iterator[tuple[PartlyRead, bool]]:
        """The blocks to read, from which document on, and whether another rank left them."""
        position, item = self.position, 0 if self.left else self.item
        for left in list(self.left):
            yield left, True
        for own in self._own_positions(position):
            yield PartlyRead(own, item if own == position else 0), False

    def _own_positions(self, first: BlockPosition) -> Iterator[BlockPosition]:
        """This rank's blocks from `first` on; of a file whose end is not known, until it is found (`_ended`)."""
        idle = 0
        for epoch in itertools.count(first.epoch):
            idle += 1
            for file in range(first.file if epoch == first.epoch else 0, len(self.files)):
                begin = BlockPosition(epoch, file, first.block if (epoch, file) == first[:2] else 0)
                count = self._count(begin)
                block = begin.block + (self.rank - self._owner(begin)) % self.world_size
                while (count is None or block < count) and self._ended != (epoch, file):
                    idle = 0
                    yield BlockPosition(epoch, file, block)
                    block += self.world_size
            if idle > self.world_size:
                self._raise_no_text()

    def _next_block(self) -> CutBlock:
        while True:
            self._ask_ahead()
            (position, item), is_left, begun = self._asked.popleft()
            if not is_left and self._ended == position[:2]:
                continue
            block = self._answer(position, begun, count=item == 0)
            if is_left:
                while self.left[0].position != position:
                    self.left.pop(0)
                self.item = item
            elif block is None:
                self._ended = position[:2]
            else:
                self.left, self.position, self.item = [], position, item
            if block is not None and block.documents:
                self._no_text_since = max(self._no_text_since, position.epoch + 1)
                return block
            if position.epoch - self._no_text_since > self.world_size:
                self._raise_no_text()

    def _ask_ahead(self) -> None:
        ahead = 1 if self.pool.workers == 0 else 2 * self.pool.workers
        while len(self._asked) < ahead:
            block, is_left = next(self._to_read)
            begun = self.pool.request(self.number, self._file(block.position), block.position.block)
            self._asked.append((block, is_left, begun))

    def _answer(self, position: BlockPosition, begun: Begun, count: bool) -> CutBlock | None:
        """The block; None where the file ends before it, or cannot be read from there on."""
        try:
            block = self.pool.result(self.number, self._file(position), position.block, begun)
        except BadRow as error:
            self._pass_over(error, position.epoch)
            return None
        if block is not None and block.stored is not None:
            self.check(block.stored, self._file(position))
        if block is not None and block.num_cut:
            warn_of_cuts(self.settings.path, self.pool.readers[self.number].context)
        if block is not None and count:
            for error in block.bad_rows:
                self._pass_over(error, position.epoch)
        return block

    def _pass_over(self, error: BadRow, epoch: int) -> None:
        """Count a bad row or file; too many in an epoch are an error."""
        if epoch != self.bad_epoch:
            self.bad_epoch, self.bad_rows.count = epoch, 0
        self.bad_rows(error)

    def _raise_no_text(self) -> NoReturn:
        raise UserError(f"data: '{self.settings.path}' holds no text that can be read: {self.bad_rows.why_no_text}")

    def _owner(self, position: BlockPosition) -> int:
        """The rank that reads a block. In as many epochs as there are ranks, each rank reads every block once."""
        return (position.epoch + self._number(position) + position.block) % self.world_size

    def _file(self, position: BlockPosition) -> str:
        return self.files[self._number(position)]

    def _number(self, position: BlockPosition) -> int:
        if self._order[0] != position.epoch:
            order = np.random.default_rng([self.seed, position.epoch]).permutation(len(self.files))
            self._order = position.epoch, order
        return int(self._order[1][position.file])

    def _count(self, position: BlockPosition) -> int | None:
        try:
            return self.pool.readers[self.number].count(self._file(position))
        except BadRow:  # reading it will say so, too
            return None

    def _num_blocks(self, position: BlockPosition) -> int:
        """How many blocks a file holds, if need be by reading it."""
        file, reading = self._file(position), self.pool.readers[self.number]
        if file not in self._num_blocks_of:
            count = self._count(position)
            try:
                blocks = itertools.count() if count is None else ()
                count = count or next((index for index in blocks if reading(file, index) is None), 0)
            except BadRow:
                count = 0
            self._num_blocks_of[file] = count
        return self._num_blocks_of[file]
