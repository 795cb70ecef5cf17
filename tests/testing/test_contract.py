"""Does the contract pass what is sound, and catch what is not?"""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from embedcore.provider.types import ModelInfo
from embedcore.testing import EmbedderContract, FakeEmbedder, FakeTokenizer
from embedcore.testing.fakes.embedder import FAKE_INFO

BROKEN = Path(__file__).with_name("broken_providers.py")
SERVICES = Path(__file__).with_name("broken_services.py")

CAUGHT = {
    "TestSwappedRows": "test_row_i_belongs_to_text_i",
    "TestSwappedOnlyInLargeRequests": "test_largest_request_is_accepted",
    "TestSwapsTwoRowsOfAFullRequest": "test_largest_request_is_accepted",
    "TestSwapsTwoRowsOfEveryLongRequest": "test_largest_request_is_accepted",
    "TestReversesWhatItWritesInto": "test_an_array_to_write_into_is_used_or_left_alone",
    "TestReversesQueries": "test_row_i_belongs_to_text_i",
    "TestIgnoresTheInputType": "test_input_types_make_a_difference",
    "TestNeedsAnInputType": "test_no_input_type_is_accepted",
    "TestDoublePrecision": "test_vectors_are_float32_rows",
    "TestWrongWidth": "test_width_agrees_with_info",
    "TestDropsAText": "test_one_text_or_many",
    "TestDropsDuplicates": "test_same_text_twice_in_a_request",
    "TestNotContiguous": "test_vectors_are_float32_rows",
    "TestFlat": "test_vectors_are_float32_rows",
    "TestListOfLists": "test_vectors_are_float32_rows",
    "TestNotANumber": "test_numbers_are_finite",
    "TestZeroForWhiteSpace": "test_odd_text[only white space]",
    "TestStripsWhiteSpaceAndFails": "test_odd_text[a line feed]",
    "TestOneVectorForAll": "test_different_texts_have_different_vectors",
    "TestNotRepeatable": "test_same_text_same_vector",
    "TestRowsInRandomOrder": "test_row_i_belongs_to_text_i",
    "TestSharedBuffer": "test_reply_stays_as_it_was",
    "TestNotThreadSafe": "test_several_threads_at_once",
    "TestNarrowRace": "test_several_threads_at_once",
    "TestNarrowRaceBeforeSending": "test_several_threads_at_once",
    "TestOwnedByOneThread": "test_several_threads_at_once",
    "TestChangesTheTexts": "test_texts_are_not_changed",
    "TestRefusesFullRequests": "test_largest_request_is_accepted",
    "TestOtherModelAnswers": "test_reply_names_the_model",
    "TestNamelessModel": "test_info_is_complete",
    "TestUndercounts": "test_counts_bound_the_bill",
    "TestForgetsTheOverhead": "test_counts_bound_the_bill",
    "TestCallsABoundExact": "test_counts_bound_the_bill",
    "TestCountsMoreThanItsBytes": "test_counts_stay_within_the_bytes",
    "TestLimitTwoTooHigh": "test_longest_text_is_accepted",
    "TestCutsInsideACharacter": "test_prefix_is_a_prefix_that_fits",
    "TestCutsTooMuch": "test_prefix_is_the_longest",
    "TestCutsTooLittle": "test_prefix_is_a_prefix_that_fits",
    "TestKeyInRepr": "test_secret_is_not_shown",
    "TestKeyPrinted": "test_secret_is_not_shown",
    "TestKeyInError": "test_secret_is_not_in_errors",
    "TestKeyInAnAttribute": "test_secret_is_not_in_plain_attributes",
    "TestKeyInTheSessionsHeaders": "test_secret_is_not_in_plain_attributes",
    "TestTextInError": "test_texts_are_not_in_errors",
    "TestTextInTheCauseOfAnError": "test_texts_are_not_in_errors",
    "TestRetries": "test_failed_request_is_sent_once",
    "TestRawError": "test_errors_are_typed",
    "TestHidesTheFailure": "test_failure_is_not_hidden",
    "TestClosesOnlyOnce": "test_close_may_be_called_twice",
}

ONLY = {
    # Defects that one test alone can see: the others must not fail by accident. One of a reply and
    # one of a failure, since all of the contract runs against each.
    "TestNotContiguous",
    "TestRetries",
}

# Those of a service name the test that catches them themselves.
CAUGHT_SERVICES = dict(
    re.findall(
        r"^class (Test\w+).*\n    caught_by = \"(.+)\"$",
        SERVICES.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
)


class TestFakeEmbedder(EmbedderContract):
    secret = "a-key-the-fake-has-no-use-for"

    def make_embedder(self):
        self.fake = FakeEmbedder()
        return self.fake

    def make_broken_embedder(self):
        from embedcore.errors import ProviderUnavailable

        self.broken = FakeEmbedder(script=lambda *_: ProviderUnavailable("down", status=503))
        return self.broken

    def server_bill(self):
        return self.fake.billed_tokens

    def server_requests(self):
        return len(self.broken.calls)


class TestFakeEmbedderThatEstimates(EmbedderContract):
    """The loosest provider there may be: bounds, overhead, one text at a time, no token report."""

    def make_embedder(self):
        self.fake = FakeEmbedder(
            info=ModelInfo(
                provider="fake",
                model="loose",
                max_texts_per_request=1,
                overhead_tokens_per_text=3,
                max_bytes_per_request=10_000,
            ),
            tokenizer=FakeTokenizer(exact=False),
            reports_tokens=False,
        )
        return self.fake

    def server_bill(self):
        return self.fake.billed_tokens


class TestFixtureInsteadOfMethod(EmbedderContract):
    """An author who needs fixtures defines ``embedder`` as one."""

    @pytest.fixture
    def embedder(self, tmp_path):
        assert tmp_path.exists()
        return FakeEmbedder(info=FAKE_INFO, reports_tokens=False)


def test_contract_without_an_embedder_says_what_to_define():
    with pytest.raises(NotImplementedError, match=r"make_embedder\(\) or a fixture named embedder"):
        EmbedderContract().make_embedder()


@pytest.fixture(scope="module")
def outcome(once):
    """(class, test) → "passed", "skipped" or the failure's message, from a run of its own.

    All of the contract runs against what is sound and what one test alone must see, and against
    the others the test that must catch them.
    """
    report = once("contract", run_contract) / "report.xml"
    return {
        (case.attrib["classname"], case.attrib["name"]): _result(case)
        for case in ElementTree.parse(report).iter("testcase")
    }


def run_contract(folder: Path) -> None:
    wanted = [name if name in ONLY else f"{name}::{test}" for name, test in CAUGHT.items()]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line"]
    command += [f"{BROKEN}::{one}" for one in ("TestSound", *wanted)]
    command += [f"{SERVICES}::TestSound"]
    command += [f"{SERVICES}::{name}::{test}" for name, test in CAUGHT_SERVICES.items()]
    command += [
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        "--rootdir",
        str(BROKEN.parent),
        "-c",
        "/dev/null",
    ]
    run = subprocess.run(
        [*command, f"--basetemp={folder / 'temporary'}", f"--junitxml={folder / 'report.xml'}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 1, run.stdout + run.stderr


def _result(case: ElementTree.Element) -> str:
    for kind in ("failure", "error"):
        if (found := case.find(kind)) is not None:
            return found.attrib["message"]
    return "skipped" if case.find("skipped") is not None else "passed"


def _failed(outcome: dict[tuple[str, str], str], name: str) -> dict[str, str]:
    return {
        test: result
        for (case, test), result in outcome.items()
        if case.endswith(f".{name}") and result not in ("passed", "skipped")
    }


@pytest.mark.parametrize(("file", "skipped"), [(BROKEN, 24), (SERVICES, 5)])
def test_sound_provider_passes_everything(outcome, file, skipped):
    results = [result for (case, _), result in outcome.items() if case == f"{file.stem}.TestSound"]
    assert len(results) > 100
    assert set(results) == {"passed", "skipped"}
    assert results.count("skipped") <= skipped


@pytest.mark.parametrize("name", [*CAUGHT, *CAUGHT_SERVICES])
def test_broken_provider_is_caught(outcome, name):
    failed = _failed(outcome, name)
    assert {**CAUGHT, **CAUGHT_SERVICES}[name] in failed, f"it fails only: {failed}"


@pytest.mark.parametrize("name", sorted(ONLY))
def test_defect_is_pinned_down(outcome, name):
    assert set(_failed(outcome, name)) == {CAUGHT[name]}


def test_every_broken_provider_is_expected():
    for file, caught in ((BROKEN, CAUGHT), (SERVICES, CAUGHT_SERVICES)):
        written = re.findall(r"^class (Test\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(written) == {"TestSound", *caught}
    assert len(CAUGHT_SERVICES) > 40


def test_failures_tell_the_author_what_to_mend(outcome):
    advice = {
        "TestSwappedRows": "in order by the reply's own index",
        "TestDoublePrecision": "must be float32",
        "TestUndercounts": "a count must never be too low",
        "TestRawError": "translate it into TransientProviderError",
        "TestKeyInRepr": "SecretStr",
        "TestNeedsAnInputType": "None must be accepted",
        "TestLimitTwoTooHigh": "what the service adds to each text must be taken off",
        "TestRetries": "do not retry in a provider",
        "TestNotThreadSafe": "keep what belongs to one request out of self",
    }
    for name, words in advice.items():
        assert words in _failed(outcome, name)[CAUGHT[name]], name
