"""The contract of a provider, as tests to inherit.

::

    from embedcore.testing import EmbedderContract

    class TestAcme(EmbedderContract):
        secret = "acme-0123456789"

        def make_embedder(self):
            return AcmeEmbedder(key=self.secret, url=...)

        def make_broken_embedder(self):
            return AcmeEmbedder(key=self.secret, url="http://127.0.0.1:9")  # no server

That is all: pytest collects the inherited tests. If it needs fixtures, define a fixture
``embedder`` instead of ``make_embedder``, or ``broken_embedder`` likewise. Every failure says what
to mend. Some hundreds of small requests are made, one with as many texts as the model takes, whose
texts are then sent once more, and one with the longest text. Let the server behind the broken
embedder repeat what it was sent: that is how a key or a text gets into an error.
"""

from __future__ import annotations

from embedcore.testing.contract.batches import BatchContract as BatchContract
from embedcore.testing.contract.failures import FailuresContract
from embedcore.testing.contract.instances import InstancesContract
from embedcore.testing.contract.limits import LimitsContract
from embedcore.testing.contract.provider import ProviderContract as ProviderContract
from embedcore.testing.contract.replies import RepliesContract
from embedcore.testing.contract.safety import SafetyContract
from embedcore.testing.contract.surroundings import SurroundingsContract
from embedcore.testing.contract.texts import TextsContract
from embedcore.testing.contract.tokens import TokensContract


class EmbedderContract(
    RepliesContract,
    TextsContract,
    TokensContract,
    FailuresContract,
    LimitsContract,
    SafetyContract,
    InstancesContract,
    SurroundingsContract,
):
    """Inherit, define ``make_embedder`` or a fixture ``embedder``, and run pytest.

    What else may be overridden, to test more than can be tested without:

    - ``make_broken_embedder()``: one whose every request fails, to see how.
    - ``make_slow_embedder()``: one whose server takes five seconds or more.
    - ``make_limited_embedder()``: one whose server refuses each request for its rate, and names
      ``retry_after`` seconds.
    - ``make_variant(**options)``: the working one with other options.
    - ``server_bill()``: the tokens that the server on the other side has billed so far.
    - ``server_requests()``, ``server_texts()``: what reached that server so far.
    - ``secret``: a key that is given to the embedder and must appear nowhere.
    - ``option_values``: other values of options, to be tried; None: not this one.
    - ``alike``: differences of texts that the model does not see.
    - ``tolerance``: how far two vectors of one text may be apart, as 1 − cosine.
    - ``examples``: how many texts each property is tried with.
    - ``kit``: the version of the kit; tests that came later only warn.
    - ``known_failures``: what fails, by the test's name, with the reason.
    """
