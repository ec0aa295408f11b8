"""More scenarios than were written: copies, told apart by a mark in what the customer says and knows."""

from __future__ import annotations

from schemas.company import Company, Scenario, load_companies


def many_scenarios(count: int) -> dict[str, Company]:
    """The companies with `count` scenarios all together; no two make the same request of an endpoint."""
    companies = load_companies()
    written = [(slug, scenario) for slug, company in companies.items() for scenario in company.scenarios]
    chosen: dict[str, list[Scenario]] = {slug: [] for slug in companies}
    for number in range(count):
        slug, scenario = written[number % len(written)]
        chosen[slug].append(_marked(scenario, number // len(written)))
    return {slug: company.model_copy(update={"scenarios": chosen[slug]}) for slug, company in companies.items()}


def _marked(scenario: Scenario, copy: int) -> Scenario:
    if not copy:
        return scenario
    opening, *rest = scenario.turns
    return scenario.model_copy(update={
        "id": f"{scenario.id}-{copy}",
        "customer": scenario.customer.model_copy(update={"facts": f"{scenario.customer.facts} ({copy})"}),
        "turns": [opening.model_copy(update={"customer": f"{opening.customer} ({copy})"}), *rest]})
