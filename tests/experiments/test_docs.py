"""The environments' pages, and the links of all pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsa_gym.envs import ENVIRONMENTS
from dsa_gym.experiments.docs import broken_links, write_pages

ROOT = Path(__file__).resolve().parents[2]


def test_every_environment_has_a_page(tmp_path: Path) -> None:
    pages = {page.name: page for page in write_pages(tmp_path)}
    text = "".join(page.read_text() for page in pages.values() if page.suffix == ".md")
    for env_id in ENVIRONMENTS:
        assert f"| `{env_id}` |" in text
    for page in pages.values():
        if page.suffix == ".md" and page.name != "README.md":
            for section in ("Description", "Action Space", "Observation Space", "Rewards", "Starting State",
                            "Episode End", "Arguments", "Version History"):  # fmt: skip
                assert f"\n## {section}\n" in page.read_text(), f"{page.name}: {section}"
            assert page.with_suffix(".png").stat().st_size > 1000


PAGES = [*sorted(path.name for path in ROOT.glob("*.md")), "docs/design.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert not broken_links(ROOT / page)
