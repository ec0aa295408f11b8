"""Which facts of a message its sources cover."""

import pytest

from stages._facts import unsupported

REFUNDS = "Refunds up to £40 within 30 days. The agent may change addresses."
SUNBACK = "Sunback feed-in contract: paid on the 15th of January, April, July and October."

CASES = {
    # Money
    "an amount that the policy has": (REFUNDS, "You get £40 back.", None),
    "pounds in words are the symbol's": (REFUNDS, "You get forty pounds back.", None),
    "a needless decimal changes nothing": (REFUNDS, "You get £40.00 back.", None),
    "thousands are grouped or not": ("1200.00 pounds in all", "That is £1,200.", None),
    "a decimal comma": ("I paid €12.50", "You paid 12,50 €.", None),
    "thousands with points": ("It was €1,200.50.", "It was €1.200,50.", None),
    "pence are part of a pound": ("an extra of £0.50", "It costs 50p more.", None),
    "a number of days is no price": (REFUNDS, "Your refund is £30.", "the number £30"),
    "a number of days is no price in another currency": (REFUNDS, "That is 30 euros.", "the number 30 euros"),
    "euros are not pounds": (REFUNDS, "That is €40.", "the number €40"),
    "a count is no price": ("The list holds twelve people.", "That is £12.", "the number £12"),
    "a thousand in words": (REFUNDS, "That is for orders over a thousand pounds.", "the number 1000 pounds"),
    "digits in another order": ("€9.50", "It costs €95.", "the number €95"),
    "a product's number is not part of its price": ("Brook 75 £24.00 a month", "Brook 75 is £24.00 a month.", None),
    "both ends of a range of prices": ("It costs £3-5.", "It costs £3, or £5 with a bag.", None),
    # Durations and other units
    "days that the policy has": (REFUNDS, "You have 30 days.", None),
    "a unit may be left out": (REFUNDS, "Yes, within the 30.", None),
    "sixty is read": (REFUNDS, "You have sixty days for that.", "the number 60 days"),
    "hours are not days": (REFUNDS, "You have 30 hours.", "the number 30 hours"),
    "a week is 7 days": ("Notice is seven days.", "Tell us 1 week ahead.", None),
    "48 hours are two days": ("It takes 48 hours.", "It takes two days.", None),
    "half an hour is 30 minutes": ("Wait 30 minutes.", "Have you waited half an hour?", None),
    "an hour and a half is 90 minutes": ("It takes an hour and a half.", "It takes 90 minutes.", None),
    "a month is not 30 days": (REFUNDS, "You have 1 month.", "the number 1 month"),
    "days are not working days": (REFUNDS, "You have 30 working days.", "the number 30 working days"),
    "a price by the month has a month in it": ("£42.00 a month", "Pay for 1 month.", None),
    "both ends of a range of days": ("It takes 3 to 5 working days.", "Allow 3 working days, at most 5 working days.", None),
    "what lies inside a range is not stated": ("It takes 3 to 5 days.", "It takes 4 days.", "the number 4 days"),
    "a customer's answer has the unit of the question": ("44. all on the same sunday", "Then 44 days it is.", None),
    "per cent has a sign": ("10 percent off", "You save 10%.", None),
    "per cent is no money": ("10 percent off", "You save £10.", "the number £10"),
    "a second after a number is a unit": ("Hold it for 30 seconds.", "After a 30 second wait it blinks.", None),
    # Numbers alone
    "a ticket's number": ("created CK-2001 (delivery)", "Your ticket is CK-2001.", None),
    "another ticket's number": ("created CK-2001 (delivery)", "Your ticket is CK-2002.", "the number 2002"),
    "a source may write the number out": ("five tins, ordered twice", "5 tins and 2 orders.", None),
    "a compound number word is one number": ("two hundred and twenty tins", "200 tins?", "the number 200"),
    "a number below ten is a figure of speech": (REFUNDS, "Ten points, and there are two ways.", None),
    "a number above ten is not": (REFUNDS, "Twelve places are left.", "the number 12"),
    "an ordinal is a figure of speech": (REFUNDS, "A sixteenth one would be too many.", None),
    "small numbers in digits are facts": (REFUNDS, "Up to 2 tins.", "the number 2"),
    "a number with several points": ("code 2.8.0", "Read out 2.8.0.", None),
    "no source is enough for no fact": ("", "We are glad to help.", None),
    # Times of day
    "a time in another notation": ("open 07:30 to 19:00", "Open from 7:30 to 7 pm.", None),
    "another time with the same digits": ("open 07:30 to 19:00", "Open until 19:30.", "the time of day 19:30"),
    "evening is not morning": ("open from 7 am", "Open from 7 pm.", "the time of day 7 pm"),
    "an hour in a customer's words": ("it drops out around eleven", "The eleven o'clock drop, then.", None),
    # Dates
    "the agent may is no month": (REFUNDS, "It arrives on 30 May.", "the date 30 May"),
    "round the clock is no date": (f"{REFUNDS} Our market hall is open 24/7.", "It arrives on 30 March.", "the date 30 March"),
    "round the clock is no July": (f"{REFUNDS} Open 24/7.", "It arrives on 24 July.", "the date 24 July"),
    "day and month of two dates": ("4 April and 5 March", "It left on 4 March.", "the date 4 March"),
    "a short month": ("sent 4 Mar", "It left on the 4th of March.", None),
    "the month first": ("sent on March 4th", "It left on 4 March.", None),
    "an ISO date": ("sent 2024-03-04", "It left on 4 March 2024.", None),
    "an ISO date of another month": ("sent 2024-04-03", "It left on 4 March.", "the date 4 March"),
    "the year of another date": ("sent 2024-03-04", "It left on 4 March 2023.", "the number 2023"),
    "a slash date": ("sent on 04/03/2024", "It left on 4 March.", None),
    "a slash date of another month": ("sent on 04/05/2024", "It left on 4 March.", "the date 4 March"),
    "a date with points": ("sent on 04.03.2024", "It left on 4 March.", None),
    "two days of a month": ("on 12 and 16 May", "Your visits of 12 May and 16 May count.", None),
    "one day of several months": (SUNBACK, "It is paid on the 15th of July.", None),
    "another month": (SUNBACK, "It is paid on the 15th of August.", "the date 15th of August"),
    "a day whose month the same source names": ("a jab on 3 April, and we go on the 30th", "From 3 to 30 April that is enough.", None),
    "a small may at the end of a clause": ("read on 3 may. i wrote it down", "8812 on the 3rd of May.", "the number 8812"),
    "may as a verb": ("you can send 3", "The 3 may be sent.", None),
    "a month and then a pronoun": (REFUNDS, "The January one or the new one?", None),
    # Titles
    "a title of a source": ("Dented\ntins: they travel in sleeves", "Read “Dented tins.”", None),
    "a title in curly quotes": (REFUNDS, "Read “Dented lids”.", "the quotation 'dented lids'"),
    "a title in straight quotes": (REFUNDS, 'Read "Dented lids".', "the quotation 'dented lids'"),
    "a title in straight single quotes": (REFUNDS, "Read 'Dented lids'.", "the quotation 'dented lids'"),
    "a title in curly single quotes": (REFUNDS, "Read ‘Dented lids’.", "the quotation 'dented lids'"),
    "a title in angle quotes": (REFUNDS, "Read «Dented lids».", "the quotation 'dented lids'"),
    "a title in low quotes": (REFUNDS, "Read „Dented lids“.", "the quotation 'dented lids'"),
    "an apostrophe within a title": ("Kids' camp: a day", "Read 'Kid's camps'.", "the quotation 'kid's camps'"),
    "a title of one word": (REFUNDS, "Press “Leave”.", "the quotation 'leave'"),
    "a title that is part of a word": ("no leavers here", "Press “Leave”.", "the quotation 'leave'"),
    "apostrophes quote nothing": ("", "It’s the customers' own; don't worry about the dogs' beds.", None),
    "what stands between two quotations": ("Returns: press Print label", 'Choose "Returns" and then "Print label".', None),
    "an unquoted title": (REFUNDS, "See the article Dented lids.", "the article 'dented lids'"),
    "an unquoted title of one word": (REFUNDS, "See article Pricing.", "the article 'pricing'"),
    "an unquoted title that a source has": ("Dented tins: they travel", "The article Dented tins has more on that.", None),
    "an article without a title": (REFUNDS, "Our articles don't say, and the article gives no date.", None),
}


@pytest.mark.parametrize("source, message, missing", CASES.values(), ids=list(CASES))
def test_a_message_may_state_what_its_sources_have(source, message, missing):
    assert unsupported(message, ["Something else.", source]) == missing


def test_facts_may_come_from_several_sources():
    assert unsupported("5 tins for £12.", ["five tins", "they are £12"]) is None


@pytest.mark.parametrize("message", ["It takes 5 ſec.", "It takes 30 mın.", "On ſep 3.", "At mıdday."])
def test_letters_that_only_ignoring_case_makes_alike_are_read_as_those(message):
    assert unsupported(message, ["5 sec, 30 min, 3 September, midday"]) is None
    assert unsupported("Within 7 ſec.", ["30 mın"]) == "the number 7 sec"
