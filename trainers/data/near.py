"""Near-duplicates by MinHash and locality-sensitive hashing (Broder 1997), through datasketch. Imports neither ray nor
torch."""

from collections.abc import Iterator, Sequence

THRESHOLD = 0.8
"""Jaccard similarity of two texts' word 5-grams above which they count as one."""
PERMUTATIONS = 128
_SHINGLE = 5


def near_duplicates(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Texts that are close to an earlier one: their number, and the earlier one's, from 1. Always the same ones."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    kept: dict[int, MinHash] = {}
    for number, text in enumerate(texts, 1):
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch(_shingles(text))
        similar = [n for n in index.query(sketch) if isinstance(n, int)]
        close = [n for n in similar if sketch.jaccard(kept[n]) >= THRESHOLD]
        if close:
            yield number, min(close)
            continue
        kept[number] = sketch
        index.insert(number, sketch)


def _shingles(text: str) -> list[bytes]:
    words = text.lower().split()
    count = max(1, len(words) - _SHINGLE + 1)
    return [" ".join(words[i : i + _SHINGLE]).encode(errors="surrogatepass") for i in range(count)]
