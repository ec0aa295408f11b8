"""What counts as a fact in a message, and which sources cover it."""

import pytest

from stages._facts import months, number_words, numbers, unsupported


@pytest.mark.parametrize("text, found", [
    ("it is £9.50", {"9.5"}), ("9,50 €", {"9.5"}), ("€9,5", {"9.5"}), ("£1,200.00", {"1200"}), ("1200", {"1200"}), ("£12,345,678", {"12345678"}),
    ("1,234.50", {"1234.5"}), ("40.00", {"40"}), ("12,500", {"12500"}), ("at 7:05 or 19:30", {"7", "5", "19", "30"}), ("12.05", {"12.05"}),
    ("007", {"7"}), ("0", {"0"}), ("0.50", {"0.5"}), ("NC-2207", {"2207"}), ("2024-03-09", {"2024", "3", "9"}), ("the 2nd", {"2"}),
    ("5.", {"5"}), ("3, 4 and 5", {"3", "4", "5"}), ("version 7.2", {"7.2"}), ("five tins", set()), ("", set())])
def test_numbers_are_normalised(text, found):
    assert numbers(text) == found


@pytest.mark.parametrize("text, found", [
    ("Three tins, twice", {"3", "2"}), ("the first of TWENTY", {"1", "20"}), ("ninety days", {"90"}), ("a hundred", {"100"}),
    ("the tenor is done", set()), ("3 tins", set())])
def test_number_words_are_read_as_digits(text, found):
    assert number_words(text) == found


@pytest.mark.parametrize("text, found", [
    ("on 5 May", {"may"}), ("on May 5", {"may"}), ("the 2nd of September", {"sep"}), ("12 Sept.", {"sep"}), ("3rd JUNE and 1 July", {"jun", "jul"}),
    ("you may ask", set()), ("in March", set()), ("on 5 March", {"mar"})])
def test_a_month_counts_as_part_of_a_date(text, found):
    assert months(text) == found


@pytest.mark.parametrize("message, source", [
    ("It costs £9.50.", "Green Tin €9.50"), ("That is £1,200.", "1200.00 in all"), ("You paid 12,50.", "I paid €12.50"),
    ("Within 3 days.", "within three days"), ("Two attempts are 2.", "I tried twice"), ("Open from 7:30.", "07:30 to 19:00"),
    ("Your ticket is CK-2001.", "created CK-2001 (delivery)"), ("It left on 4 March.", "sent 4 Mar"), ("It left on 4 March.", "sent 2024-03-04"),
    ("It left on 4 March.", "sent on 4/3"), ("Read “Dented tins”.", "Dented tins: they travel in sleeves"),
    ('Read "dented   tins."', "Dented\ntins"), ("Open ‘Your plan’.", "choose Your plan in the app"), ("Press “Leave”.", "no such button"),
    ("It’s the customer’s own; don’t worry.", ""), ("Twenty tins would do.", "nothing"), ("Thank you.", "")])
def test_what_a_source_has_is_supported(message, source):
    assert unsupported(message, ["something else", source]) is None


@pytest.mark.parametrize("message, source, missing", [
    ("It costs £9.50.", "€9.05", "the number 9.5"), ("It costs £95.", "€9.50", "the number 95"), ("Within 3 days.", "within 30 days", "the number 3"),
    ("Up to 2 tins.", "two hundred and twenty", None), ("Up to 7 tins.", "two hundred and twenty", "the number 7"),
    ("Open until 20:00.", "open until 8", "the number 0"), ("Your ticket is CK-2002.", "created CK-2001", "the number 2002"),
    ("It left on 4 March.", "4 days ago, on 5 April", "a date in mar"), ("Read “Dented lids”.", "Dented tins", "the quotation 'dented lids'"),
    ("Open ‘Your plan’.", "your new plan", "the quotation 'your plan'"), ("9 and 8.", "", "the number 8"),
    ("On 4 March, “Your plan”, 7.", "", "the number 4")])
def test_what_no_source_has_is_named(message, source, missing):
    assert unsupported(message, [source]) == missing


def test_parts_may_come_from_several_sources_and_no_source_is_enough_for_no_fact():
    assert unsupported("5 tins for £12.", ["five tins", "they are £12"]) is None
    assert unsupported("We are glad to help.", []) is None
    assert unsupported("We have 5.", []) == "the number 5"


@pytest.mark.parametrize("text", ["They went out in 2 separate parcels.", "Give it 3 decent shakes.", "The 4 marked shelves."])
def test_other_words_that_begin_like_a_month_are_no_date(text):
    assert months(text) == set()


def test_what_stands_between_two_straight_quotations_is_not_quoted():
    assert unsupported('Choose "Returns" and then "Print label".', ["Returns: press Print label"]) is None


def test_a_compound_number_word_is_one_number():
    assert unsupported("That is 25.", ["it was twenty-five"]) is None
