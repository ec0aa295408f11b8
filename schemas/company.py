"""What a company folder under data/companies/ is, and how it is read.

    company.yaml  policy.md  articles/<name>.md  scenarios/*.yaml

People edit these files by hand, so every fault is reported with the file, the field and a hint. A file that would not be
read is a fault too: nothing that somebody wrote is left out in silence.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from schemas.action import TOOLS, Action, ActionName, HandoffReason, make_action
from schemas.errors import InputError

COMPANIES = Path("data/companies")
RESERVED = frozenset({"cost", "judge", "pooled", "rule", "threshold", "training"})
"""Keys that stand beside the companies' in metrics files: a company of that name would overwrite one."""
_M = TypeVar("_M", bound=BaseModel)

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
TicketId = Annotated[str, StringConstraints(pattern=r"^[A-Z]{2,3}-\d{4}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Kind(StrEnum):
    """What a scenario is for: a hand-off, a look-alike that the agent may deal with, or everyday support."""

    HANDOFF = "handoff"
    NEAR_MISS = "near_miss"
    ORDINARY = "ordinary"


class Cue(StrEnum):
    """How a hand-off shows: in so many words, in the policy's numbers, or in none of the words one would look for."""

    PLAIN = "plain"
    NUMBER = "number"
    UNDERSTATED = "understated"


class Refund(_Strict):
    """What the agent may refund alone: up to `limit` (in `currency`) within `window_days`."""

    window_days: float = Field(gt=0)
    limit: float = Field(ge=0)
    currency: Text


class Product(_Strict):
    """Something the company sells, with its price as the agent would say it."""

    name: Text
    price: Text


class Profile(_Strict):
    """`company.yaml`."""

    name: Text
    sector: Text
    voice: Text
    ticket_prefix: Annotated[str, StringConstraints(pattern=r"^[A-Z]{2,3}$")]
    ticket_categories: list[Annotated[str, StringConstraints(pattern=r"^[a-z]+(_[a-z]+)*$")]] = Field(min_length=1)
    refund: Refund
    company_rule: Text
    products: list[Product] = Field(min_length=1)


class Ticket(_Strict):
    """A support ticket."""

    id: TicketId
    category: Text
    summary: Text


class Step(_Strict):
    """One step of the reference agent."""

    thought: Text
    action: ActionName
    args: dict[str, Any] = {}
    message: str = ""

    @model_validator(mode="after")
    def _is_valid_action(self) -> Step:
        self.as_action()
        return self

    def as_action(self) -> Action:
        """The step as the protocol's object.

        Raises:
            ActionError: if arguments or message do not fit the action.
        """
        return make_action(self.thought, self.action, self.args, self.message.strip())


class Customer(_Strict):
    """What whoever plays the customer is told."""

    aim: Text
    facts: Text
    temperament: Text


class Turn(_Strict):
    """A customer's message and the agent's steps up to the next word to the customer."""

    customer: Text
    agent: list[Step] = Field(min_length=1)

    @model_validator(mode="after")
    def _tools_then_speech(self) -> Turn:
        *before, last = self.agent
        if any(step.action not in TOOLS for step in before):
            raise ValueError("reply, clarify and escalate end the agent's turn; only tool calls may come before")
        if last.action in TOOLS:
            raise ValueError("the agent's turn must end in reply, clarify or escalate")
        return self


class Scenario(_Strict):
    """One whole conversation as written, with what is needed to play it again."""

    id: Slug
    kind: Kind
    reason: HandoffReason | None = None
    cue: Cue | None = None
    ticket_start: int = Field(default=1001, ge=1000, le=9900)
    tickets: list[Ticket] = []
    customer: Customer
    turns: list[Turn] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Scenario:
        escalates = [step for step in self.steps if step.action is ActionName.ESCALATE]
        if (self.reason is None) != (self.kind is Kind.ORDINARY):
            raise ValueError("reason belongs to handoff and near_miss, and only to them")
        if (self.cue is not None) != (self.kind is Kind.HANDOFF):
            raise ValueError("cue belongs to handoff, and only to it")
        if self.kind is not Kind.HANDOFF and escalates:
            raise ValueError(f"a {self.kind} conversation must not escalate")
        if self.kind is Kind.HANDOFF:
            if len(escalates) != 1 or self.turns[-1].agent[-1].action is not ActionName.ESCALATE:
                raise ValueError("a handoff conversation must end with its only escalate")
            if escalates[0].args["reason"] != self.reason:
                raise ValueError(f"the escalate step's reason is not the scenario's ({self.reason})")
        return self

    @property
    def steps(self) -> list[Step]:
        """All steps of the reference agent, in order."""
        return [step for turn in self.turns for step in turn.agent]


class Article(_Strict):
    """A help-centre article: its file name without `.md`, its title, its paragraphs."""

    id: Slug
    title: Text
    paragraphs: list[Text] = Field(min_length=1)


class Company(_Strict):
    """A whole company folder."""

    slug: str
    profile: Profile
    policy: Text
    articles: list[Article]
    scenarios: list[Scenario]


def company_slugs(root: Path = COMPANIES) -> list[str]:
    """The folders under data/companies/ that hold a company.yaml, sorted.

    Raises:
        InputError: a folder holds other parts of a company and no company.yaml.
    """
    for folder in sorted(root.glob("[!.]*/")):
        parts = [name for name in ("company.yml", "policy.md", "articles", "scenarios") if (folder / name).exists()]
        if parts and not (folder / "company.yaml").is_file():
            raise InputError(f"{folder}/company.yaml does not exist, but {folder / parts[0]} does: the folder would not be used",
                             "add company.yaml, with exactly that name, or move the folder elsewhere")
    return sorted(path.parent.name for path in root.glob("*/company.yaml"))


def slug_fault(name: str) -> str | None:
    """Why a name cannot be a company's slug, or None if it can."""
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        return f"{name!r} is no slug: small letters, digits, hyphens"
    return f"'{name}' is a key of metrics files" if name in RESERVED else None


def company_files(slug: str, root: Path = COMPANIES) -> list[Path]:
    """Every file a company is read from."""
    folder = root / slug
    return [folder / "company.yaml", folder / "policy.md",
            *sorted(folder.glob("articles/*.md")), *sorted(folder.glob("scenarios/*.yaml"))]


def _refuse_what_is_not_read(folder: Path) -> None:
    known = set(company_files(folder.name, folder.parent))
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path not in known and not hidden and not path.is_dir():
            raise InputError(f"{path} is none of a company's files and would not be read",
                             "those are company.yaml, policy.md, articles/<name>.md and scenarios/<name>.yaml: rename it or take it out")


def load_companies(root: Path = COMPANIES) -> dict[str, Company]:
    """All companies by slug.

    Raises:
        InputError: no company there, or a broken file.
    """
    slugs = company_slugs(root)
    if not slugs:
        raise InputError(f"no company.yaml under {root}", "put each company in a folder of its own; README, 'Your own company'")
    return {slug: load_company(slug, root) for slug in slugs}


def load_company(slug: str, root: Path = COMPANIES) -> Company:
    """Read and check one company folder.

    Raises:
        InputError: a file is missing, broken or none of a company's, or the folder's name is no slug; says which, the field, and what to do.
    """
    folder = root / slug
    if not (folder / "company.yaml").is_file():
        raise InputError(f"unknown company '{slug}': {folder}/company.yaml does not exist",
                         f"companies here: {', '.join(company_slugs(root)) or 'none'}")
    if fault := slug_fault(slug):
        raise InputError(f"{folder}: {fault}", f"rename the folder; other names than {', '.join(sorted(RESERVED))} are free")
    _refuse_what_is_not_read(folder)
    profile = _validate(Profile, read_yaml(folder / "company.yaml"), folder / "company.yaml")
    policy = _read_text(folder / "policy.md").strip()
    if not policy:
        raise InputError(f"{folder / 'policy.md'} is empty", "state the policy in at most 150 words")
    articles = [_read_article(path) for path in sorted(folder.glob("articles/*.md"))]
    scenarios = [scenario for path in sorted(folder.glob("scenarios/*.yaml")) for scenario in _read_scenarios(path, profile)]
    for name, items in (("article", articles), ("scenario", scenarios)):
        if not items:
            raise InputError(f"{folder}/{name}s holds no {name}", f"write at least one {name}; see data/companies/README.md")
    seen: set[str] = set()
    for scenario in scenarios:
        if scenario.id in seen:
            raise InputError(f"{folder}/scenarios: id '{scenario.id}' occurs twice", "give each scenario an id of its own")
        seen.add(scenario.id)
    return Company(slug=slug, profile=profile, policy=policy, articles=articles, scenarios=scenarios)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", "the file must exist and be UTF-8 text") from None


def read_yaml(path: Path) -> Any:
    """What a YAML file holds; a key that occurs twice is a fault.

    Raises:
        InputError: the file cannot be read, or is not YAML.
    """
    try:
        return yaml.load(_read_text(path), Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise InputError(f"{path}{line} is not YAML: {problem}",
                         "put text with a colon, '#' or quotes in a block scalar (|-)") from None


class _Loader(yaml.CSafeLoader):
    """YAML in which a key that occurs twice is a fault: the first value would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping with each key once."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_article(path: Path) -> Article:
    title, _, body = _read_text(path).strip().partition("\n")
    if not title.startswith("# "):
        raise InputError(f"{path} line 1: no '# Title'", "start an article with '# ' and its title")
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", body) if part.strip()]
    return _validate(Article, {"id": path.stem, "title": title[2:], "paragraphs": paragraphs}, path)


def _read_scenarios(path: Path, profile: Profile) -> list[Scenario]:
    data = read_yaml(path)
    if not isinstance(data, list):
        raise InputError(f"{path} is not a list of scenarios", "start each scenario with '- id: …'")
    scenarios = []
    for number, item in enumerate(data, 1):
        name = item.get("id") if isinstance(item, dict) else None
        scenario = _validate(Scenario, item, path, f"scenario '{name or number}' ")
        for ticket in scenario.tickets:
            if not ticket.id.startswith(f"{profile.ticket_prefix}-") or ticket.category not in profile.ticket_categories:
                raise InputError(f"{path}: scenario '{scenario.id}' tickets: {ticket.id} ({ticket.category}) is not one of this company's",
                                 f"company.yaml has the prefix {profile.ticket_prefix} and: {', '.join(profile.ticket_categories)}")
        for step in scenario.steps:
            if step.action is ActionName.CREATE_TICKET and step.args["category"] not in profile.ticket_categories:
                raise InputError(f"{path}: scenario '{scenario.id}' create_ticket category '{step.args['category']}' is unknown",
                                 f"company.yaml has: {', '.join(profile.ticket_categories)}")
        scenarios.append(scenario)
    return scenarios


def _validate(model: type[_M], data: Any, path: Path, place: str = "") -> _M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "as a whole"
        found = first.get("input")
        shown = f" (found {found!r})" if isinstance(found, (str, int, float, bool)) else ""
        raise InputError(f"{path}: {place}{field}: {first['msg'].removeprefix('Value error, ')}{shown}",
                         "see data/companies/README.md for what the file holds") from None
