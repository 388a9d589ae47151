"""Selects the tokens held out for validation, and detects duplicate documents. Both depend on contents only."""

from collections.abc import Sequence

import numpy as np

from ringattn.data.corpus import Corpus, Documents

TOLERANCE = 0.2
"""Whole documents are held out if their share of the tokens differs from data.validation by at most this fraction."""


def first_copies(sources: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Finds equal documents in all `sources`, each given as digests ([documents], any dtype that can be sorted).

    Returns a boolean array per source, True for the documents to keep, and the index of the kept copy of every
    document, both numbered across all sources. Of equal documents, keeps the one in the source with the fewest distinct
    documents, so that a file keeps the documents that its directory repeats; on ties, the first.
    """
    sizes = [digests.size for digests in sources]
    ends = np.cumsum(sizes)[:-1]
    _, content = np.unique(np.concatenate(sources), return_inverse=True)  # equal documents have equal numbers
    distinct = [np.unique(part).size for part in np.split(content, ends)]
    # lexsort is stable, so equal documents of a source, and of sources of the same size, keep their order.
    order = np.lexsort((np.repeat(distinct, sizes), content))
    is_first = np.append(True, np.diff(content[order]) > 0)
    kept_of = np.empty(content.size, np.int64)
    kept_of[order] = order[is_first][np.cumsum(is_first) - 1]
    return np.split(kept_of == np.arange(content.size), ends), kept_of


def held_out_lengths(
    lengths: np.ndarray, digests: np.ndarray, fraction: float, unit: int, name: str, whole: np.ndarray | None = None
) -> np.ndarray:
    """Returns the number of tokens at the end of each document that are held out: none, some or all.

    Documents are held out in the order of their digests until they contain about `fraction` of all tokens. Adding
    files therefore changes few of them. If whole documents would miss the fraction by more than TOLERANCE, the end of
    one is held out, at a multiple of `unit` tokens. Neither side is empty.

    `lengths`: [documents] tokens, with the boundary. `digests`: [documents], distinct. `whole`: [documents] bool, True
    for documents that are split only if there is no other, such as those with prompts. `name` is used in messages.
    Raises ValueError if there is a single document that is too short to be split.
    """
    units = (lengths - 1) // unit
    held_out = np.zeros_like(lengths)
    if lengths.size == 1:
        if units[0] < 2:
            size = f"{units[0]} tokens or frames"
            raise ValueError(f"{name} is a single document of {size}, too short to hold out its end; use a longer one")
        held_out[0] = unit * min(max(round(fraction * int(units[0])), 1), int(units[0]) - 1)
        return held_out
    order, total = np.argsort(digests, kind="stable"), int(lengths.sum())
    target = fraction * total
    count = int(np.searchsorted(np.cumsum(lengths[order]), target, side="right"))
    held_out[order[:count]] = lengths[order[:count]]
    taken = int(held_out.sum())
    for document in order[count:]:
        length, missing = int(lengths[document]), target - taken
        nearer = length - missing < missing and length - missing <= TOLERANCE * target
        if nearer and taken + length < total:
            held_out[document] = length
            taken += length
        elif missing <= TOLERANCE * target:
            break
        elif units[document] > 1 and (whole is None or not whole[document]):
            held_out[document] = unit * min(max(round(missing / unit), 1), int(units[document]) - 1)
            return held_out
    if not taken:
        shortest = order[np.argmin(lengths[order])]
        held_out[shortest] = lengths[shortest]
    return held_out


def split(corpus: Corpus, held_out: np.ndarray) -> tuple[Corpus, Corpus]:
    """Returns (training, validation): `held_out` ([documents]) tokens at the end of each document are for validation.

    No token is a target in both, and no row contains tokens of both.
    """
    lengths = corpus.lengths - held_out
    training = corpus._replace(lengths=lengths, masked_prefixes=np.minimum(corpus.masked_prefixes, lengths))
    validation = corpus._replace(
        starts=corpus.starts + lengths,
        lengths=held_out,
        masked_prefixes=np.maximum(corpus.masked_prefixes - lengths, 0),
    )
    return training.take(lengths > 0), validation.take(held_out > 0)


def describe_split(
    name: str, training: Sequence[Corpus], validation: Sequence[Corpus], documents: int, fraction: float, unit: int
) -> str:
    """Returns a line with the number of training tokens and of held-out tokens.

    If the share is not about `fraction`, the line ends with the reason. `documents`: number of documents before the
    split. `unit`: see `held_out_lengths`.
    """
    tokens, held_out = (sum(corpus.count for corpus in side) for side in (training, validation))
    pieces, held_out_pieces = (sum(corpus.starts.size for corpus in side) for side in (training, validation))
    share, ends = held_out / (tokens + held_out), pieces + held_out_pieces - documents
    whole = held_out_pieces - ends
    parts = [_count(whole, "document")] * (whole > 0) + [f"the end of {_count(ends, 'document')}"] * (ends > 0)
    line = f"{name}: {tokens:,} training tokens ({1 - share:.1%}) in {_count(pieces, 'document')}, "
    line += f"{held_out:,} held-out tokens ({share:.1%}, data.validation={fraction}) in {' and '.join(parts)}"
    if abs(share - fraction) <= TOLERANCE * fraction:
        return line
    if unit > 1:
        return f"{line}; videos are split only between frames"
    has_prompts = any(corpus.masked_prefixes.any() for corpus in (*training, *validation))
    return (
        f"{line}; {'documents with prompts are not split' if has_prompts else 'the documents are too short to split'}"
    )


def describe_copies(paths: Sequence[str], sources: Sequence[Documents], kept_of: np.ndarray) -> list[str]:
    """Returns a line with the number of documents that are copies, and an example; none if there is no copy.

    `kept_of`: see `first_copies`.
    """
    copies = np.flatnonzero(kept_of != np.arange(kept_of.size))
    if not copies.size:
        return []
    ends = np.cumsum([source.digests.size for source in sources])

    def name(index: int) -> str:
        number = int(np.searchsorted(ends, index, side="right"))
        in_source = index - int(ends[number]) + sources[number].digests.size
        path = f" (data.path={paths[number]!r})" if len(paths) > 1 else ""
        return sources[number].name(in_source) + path

    example = f"{name(int(copies[0]))} is the same as {name(int(kept_of[copies[0]]))}"
    fix = "; to use a path more often, set data.mixture" if len(paths) > 1 else ""
    count = f"{copies.size:,} of {_count(kept_of.size, 'document')}"
    return [f"data: skipped {count}, duplicates of others; e.g. {example}{fix}"]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)
