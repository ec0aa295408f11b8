"""A small company folder that is valid and has no faults, for tests to break."""

import os

import pytest

# Else every dvc command in a repository made here starts a process that reports it.
os.environ.setdefault("DVC_NO_ANALYTICS", "1")

COMPANY = """\
name: Copper Kettle
sector: teas by post
voice: Short and warm, no exclamation marks.
ticket_prefix: CK
ticket_categories: [delivery, billing]
refund: {window_days: 30, limit: 40, currency: "€"}
company_rule: Orders of more than 20 tins at once are quoted by a person.
products:
  - {name: Green Tin, price: "€9.50"}
  - {name: Oolong Tin, price: "€14.00"}
"""

POLICY = """\
The agent refunds up to €40 within 30 days. Address changes, dented tins and forgotten passwords are its own.
Hand off: security, somebody else used the account; safety, anybody is ill; company_rule, more than 20 tins at once.
"""

ARTICLES = {
    "brewing-oolong": """\
# Brewing oolong

Oolong likes water at 90 degrees and three grams a cup. Let it stand for three minutes, then pour off
every drop, since leaves left in water turn bitter.

The same leaves give four more cups. Add half a minute each time, keep the pot warm between pourings, and use the leaves within one day.
""",
    "dented-tins": """\
# Dented tins

Tins travel in cardboard sleeves, and one in a hundred still arrives with a dent. The tea inside sits in a sealed bag, so a dent spoils nothing.

Write to us within 14 days with the number on the lid. A new tin leaves the warehouse on the next Tuesday, and you may keep the old one.
""",
}

SCENARIOS = {
    "handoff": """\
- id: order-from-another-town
  kind: handoff
  reason: security
  cue: understated
  customer: {aim: Find out who ordered., facts: An order to a town she has never been to., temperament: Puzzled.}
  turns:
    - customer: funny, my account says that 3 green tins went to Tromsø
      agent:
        - thought: Three tins went to Tromsø; whether she sent them as a gift is not known yet.
          action: clarify
          message: Did you or somebody in your family send them there?
    - customer: no, I live alone and know nobody up north
      agent:
        - thought: She sent nothing to Tromsø and lives alone, so a stranger used the account.
          action: escalate
          args: {reason: security}
          message: Then somebody else has used your account, and a colleague takes this over now.
""",
    "others": """\
- id: password-after-holiday
  kind: near_miss
  reason: security
  customer: {aim: Get back in., facts: Forgot the password on holiday., temperament: Cheerful.}
  turns:
    - customer: two weeks at the sea and my password is gone from my head, not stolen, only washed away
      agent:
        - thought: He forgot the password himself on holiday, so a reset link will do.
          action: reply
          message: A link for a new password is on its way to your mail.

- id: dent-in-the-lid
  kind: ordinary
  ticket_start: 2001
  customer: {aim: Get a new tin., facts: 'Oolong Tin, dented, number 778.', temperament: Calm.}
  turns:
    - customer: the oolong came with a dent as deep as my thumb, is the tea still good?
      agent:
        - thought: A dented oolong tin; the article says what becomes of the tea in it.
          action: search_kb
          args: {query: dented tin}
        - thought: The bag in the tin is sealed, and a new tin needs the number on the lid.
          action: reply
          message: The tea is fine. Which number stands on the lid?
    - customer: "778, and please leave it with the neighbour"
      agent:
        - thought: Number 778 is known, so the new tin can be ordered.
          action: create_ticket
          args: {category: delivery, summary: new Oolong Tin for 778}
        - thought: The neighbour takes it in, which belongs in ticket CK-2001.
          action: update_ticket
          args: {ticket_id: CK-2001, note: leave it with the neighbour}
        - thought: Ordered and noted; the tin leaves on Tuesday.
          action: reply
          message: CK-2001 is open, and a new tin leaves on Tuesday for your neighbour.
""",
}


@pytest.fixture
def company_folder(tmp_path):
    """The folder of `teashop`, under `data/companies` of the test's own directory."""
    folder = tmp_path / "data/companies/teashop"
    for name in ("articles", "scenarios"):
        (folder / name).mkdir(parents=True)
    files = {"company.yaml": COMPANY, "policy.md": POLICY}
    files |= {f"articles/{name}.md": text for name, text in ARTICLES.items()}
    files |= {f"scenarios/{name}.yaml": text for name, text in SCENARIOS.items()}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder
