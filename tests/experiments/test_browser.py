"""The dashboards in a real browser: headless Chromium on a local TensorBoard over two short runs.

Screenshots are left in pytest's temporary folder (``--basetemp`` names it), to be looked at.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsa_gym.experiments.cli import main

pytestmark = pytest.mark.slow

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,1300",
)
STEPS, PATIENCE = 8192, 120  # environment steps, seconds
RUNS = [f"text/DSA-Text-v0-ppo-seed{seed}" for seed in (0, 1)]

TEXT = """
const collect = node => {
  if (node.nodeType === Node.TEXT_NODE) return node.textContent + ' ';
  if (['STYLE', 'SCRIPT', 'TEMPLATE'].includes(node.nodeName)) return '';
  const frame = node.nodeName === 'IFRAME' && node.contentDocument ? [node.contentDocument.body] : [];
  const inner = [...frame, ...(node.shadowRoot ? [node.shadowRoot] : []), ...node.childNodes];
  return inner.map(collect).join('');
};
return collect(document.body).replace(/\\s+/g, ' ');
"""
"""All text of the page, through shadow roots and frames: TensorBoard is made of Angular and Polymer components."""

TABS = {
    "timeseries": ["diversity /distinct", "gate_activation", "oracle", "policy", "unseen", "uses", *RUNS],
    "scalars": ["diversity/distinct", "gate_kl", "oracle", "policy", "unseen", "uses", *RUNS],
    "custom_scalars": [
        *("Policy quality", "Reward parts", "What the policy uses", "Gates", "Training"),
        *("Score: 0 best static, 1 reference", "Gain over static, unseen, 95 %", "Regret", "Matches (4)"),
    ],
    "images": ["gates/sites", "gates/users", *RUNS],
    "hparams": ["agent", "ppo", "batch_size", "unseen/normalized_score", *RUNS],
    "projector": ["Points: 152", "users", "most frequent mask"],
    "text": ["examples", "prompt", "loss with the mask", "loss, nothing on", "model writes, with the mask"],
}
"""Tab to what it must show: tags, charts, runs, the 136 seen and 16 unseen users of the shipped bundle."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A TensorBoard over two seeds of PPO on the shipped bundle, in a folder of a folder."""
    logdir = tmp_path_factory.mktemp("runs")
    for seed in ("0", "1"):
        steps = ["--steps", str(STEPS), "--evaluate-every", str(STEPS // 4), "--num-envs", "64"]
        assert main(["train", "--logdir", str(logdir / "text"), "--seed", seed, *steps]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1"]
    with (logdir / "tensorboard.log").open("w") as log:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        runs = f"{address}/data/runs"
        wait(lambda: all(run in fetch(runs) for run in RUNS), lambda: (logdir / "tensorboard.log").read_text())
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, of the extra 'test'")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.set_script_timeout(PATIENCE)  # drawing charts can keep a busy machine for a while
    yield opened
    opened.quit()


def fetch(address: str) -> str:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=10) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def wait(condition: Any, explain: Any) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, explain()
        time.sleep(0.5)


@pytest.mark.parametrize("tab", TABS)
def test_the_dashboards_show_the_policy(browser: Any, url: str, tab: str, tmp_path_factory: Any) -> None:
    browser.get("about:blank")  # a new hash alone would not load anything
    browser.get(f"{url}/?darkMode=false#{tab}")
    shown = ""

    def complete() -> bool:
        nonlocal shown
        shown = browser.execute_script(TEXT)
        return all(name in shown for name in TABS[tab])

    folder = tmp_path_factory.getbasetemp() / "screenshots"
    folder.mkdir(exist_ok=True)
    try:
        wait(complete, lambda: f"{[name for name in TABS[tab] if name not in shown]} not in: {shown[:2000]}")
        time.sleep(3)  # charts are drawn after their names
    finally:
        browser.save_screenshot(str(Path(folder) / f"{tab}.png"))
