"""What requests of one instance hold in its cache of prefixes."""

from __future__ import annotations

from voltana.sim.engine.request import SimRequest
from voltana.sim.policies.parts.radix import Node, RadixCache
from voltana.sim.policies.requests import Prompt


class HeldPrefixes:
    """Each request that is here holds the cache up to one node; the rest of it is its own."""

    def __init__(self, cache: RadixCache) -> None:
        """Nobody holds anything of this cache."""
        self._cache = cache
        self.nodes: dict[int, Node] = {}
        """Where the tokens that a request has locked end, by its number."""
        self._said: dict[int, Prompt] = {}
        """Prompt and answer of each request that has been looked at and is not done."""
        self._num_taken = 0
        """Iterations of the run whose memory is taken; that of the running one is."""

    def whole(self, request: SimRequest) -> Prompt:
        """Prompt and answer of a request, its answer as long as it will be."""
        found = self._said.get(request.request_id)
        if found is None:
            prompt = request.prompt
            assert prompt is not None  # `simulate` refuses a cache without
            found = prompt.followed_by(request.answer, request.output_tokens)
            self._said[request.request_id] = found
        return found

    def lock(self, request: SimRequest, node: Node) -> None:
        """It holds what was found of it."""
        self._cache.lock(node)
        self.nodes[request.request_id] = node

    def keep(self, request: SimRequest, end: int) -> None:
        """Its first tokens are in the cache, and held; prompt and answer are apart there."""
        node = self._cache.insert(self.whole(request), end)
        if node.start < request.input_tokens < end:
            self._cache.match(self.whole(request), request.input_tokens)  # the answer may go alone
        self._cache.lock(node)
        self._cache.unlock(self.nodes[request.request_id])
        self.nodes[request.request_id] = node

    def keep_own(self, request: SimRequest, end: int) -> None:
        """As `keep`; what of them it did not hold was its own, in memory that was taken for it."""
        self._cache.held_tokens -= end - self.nodes[request.request_id].end
        self.keep(request, end)

    def give_up(self, request: SimRequest, end: int) -> None:
        """It is retracted: of its first tokens, what was its own is gone, and the rest unlocked."""
        node = self.nodes.pop(request.request_id)
        self._cache.held_tokens -= end - node.end
        self._cache.unlock(node)

    def begin_run(self, batch_size: int) -> None:
        """A run of iterations begins; memory for what the first one writes."""
        self._num_taken = 0
        self.take(1, batch_size)

    def take(self, iterations: int, batch_size: int) -> None:
        """Memory for what the first iterations of the run write, from prefixes where it must be."""
        self._cache.hold((iterations - self._num_taken) * batch_size)
        self._num_taken = iterations

    def let_go(self, request: SimRequest) -> None:
        """It is over; what it held stays for as long as there is room."""
        self._cache.unlock(self.nodes.pop(request.request_id))
        del self._said[request.request_id]
