"""The command ``dsa-gym``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from transformers.utils.logging import disable_progress_bar

from dsa_gym import __version__

if TYPE_CHECKING:
    from dsa_gym.experiments.compare import Grid
    from dsa_gym.experiments.train import TrainConfig
    from dsa_gym.prepare import PrepareConfig

T = TypeVar("T")

console = Console()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors of the user's making end in one line and exit code 2, refused or failed parts in 1."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    parsed.arguments = sys.argv[1:] if arguments is None else list(arguments)  # as they were typed, for records
    _quiet(parsed.verbose)
    try:
        code: int | None = parsed.run(parsed)
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        if parsed.verbose:
            raise
        print(f"dsa-gym {parsed.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"dsa-gym {parsed.command}: interrupted; the same command continues it", file=sys.stderr)
        return 130
    return code or 0


def _quiet(verbose: bool) -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False, markup=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not verbose:
        disable_progress_bar()  # of loading weights
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in ("transformers", "httpx", "httpx2", "huggingface_hub", "absl"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsa-gym", description="Reinforcement-learning environments and agents for gating Dynamic Sparse Adapters."
    )
    parser.add_argument("--version", action="version", version=f"dsa-gym {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str, parent: Any = commands) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = parent.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.add_argument("--verbose", action="store_true", help="show libraries' messages and full tracebacks")
        sub.set_defaults(run=run)
        return sub

    demo = add("demo", _demo, "train PPO on the bundled environment and show where report and logs are")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for runs and report")
    demo.add_argument("--steps", type=int, default=1_000_000, help="environment steps")
    demo.add_argument("--seed", type=int, default=0)

    personas = add("personas", _personas, "generate persona text")
    personas.add_argument("--out", type=Path, required=True, help="JSON Lines file (.jsonl, .jsonl.gz, .jsonl.xz)")
    personas.add_argument("--users", type=int, default=200)
    personas.add_argument("--min-texts", type=int, default=100)
    personas.add_argument("--max-texts", type=int, default=500)
    personas.add_argument("--user-similarity", type=float, default=0.3)
    personas.add_argument("--register-similarity", type=float, default=0.2)
    personas.add_argument("--odd-spelling", type=float, default=0.0, help="share of registers typed in an odd spelling")
    personas.add_argument("--seed", type=int, default=0)

    tastes = add("tastes", _tastes, "generate interactions of people with a catalogue")
    tastes.add_argument("--out", type=Path, required=True, help="table (.csv, .tsv, .jsonl, also .gz .xz)")
    tastes.add_argument("--titles", type=Path, help="write the catalogue here")
    tastes.add_argument("--users", type=int, default=400)
    tastes.add_argument("--items", type=int, default=1000)
    tastes.add_argument("--odd", type=float, default=0.0, help="share of people with an odd habit")
    tastes.add_argument("--seed", type=int, default=0)

    hands = add("hands", _hands, "generate handwritten characters")
    hands.add_argument("--out", type=Path, required=True, help="NPZ file")
    hands.add_argument("--users", type=int, default=160)
    hands.add_argument("--per-user", type=int, default=30)
    hands.add_argument("--odd", type=float, default=0.0, help="share of people with an odd hand")
    hands.add_argument("--seed", type=int, default=0)

    pretrain = commands.add_parser("pretrain", help="pre-train a domain's small backbone")
    domains = pretrain.add_subparsers(dest="domain", required=True, metavar="DOMAIN")
    text = add("text", _pretrain_text, "pre-train the text backbone", domains)
    text.add_argument("--corpus", type=Path, nargs="+", required=True, help="text or JSON Lines, also .gz .xz .zst")
    recommendation = add("recommendation", _pretrain_recommendation, "pre-train the recommendation backbone", domains)
    _interaction_arguments(recommendation)
    recommendation.add_argument("--titles", type=Path, help="table of items with their titles, for display")
    image = add("image", _pretrain_image, "pre-train the image backbone", domains)
    _image_arguments(image)
    image.add_argument("--size", type=int, default=28, help="height and width in pixels")
    image.add_argument("--channels", type=int, default=1, help="1 or 3")
    for sub in (text, recommendation, image):
        sub.add_argument("--out", type=Path, required=True)
        sub.add_argument("--config", type=Path, help="YAML with settings of the pre-training")
        sub.add_argument("--steps", type=int, help="optimiser steps (default of the configuration)")
        sub.add_argument("--seed", type=int)

    prepare = commands.add_parser("prepare", help="make a bundle from users' data")
    domains = prepare.add_subparsers(dest="domain", required=True, metavar="DOMAIN")
    text = add("text", _prepare_text, "make a bundle from users' texts", domains)
    text.add_argument("--data", type=Path, nargs="+", required=True, help="JSON Lines, CSV or Parquet, also compressed")
    text.add_argument("--source", default="table", help="table, reddit (dumps) or twitter (exports)")
    text.add_argument("--user-column", default="user")
    text.add_argument("--text-column", default="text")
    text.add_argument("--order-column", help="time or index (default: time, timestamp or index if there)")
    text.add_argument("--scrub", metavar="SALT", help="replace identifiers and names; 16 secret characters or more")
    recommendation = add("recommendation", _prepare_recommendation, "make a bundle from users' interactions", domains)
    _interaction_arguments(recommendation)
    image = add("image", _prepare_image, "make a bundle from users' images", domains)
    _image_arguments(image)
    for name, sub in (("text", text), ("recommendation", recommendation), ("image", image)):
        sub.add_argument("--out", type=Path, required=True, help="the bundle; an unfinished one is continued")
        sub.add_argument("--backbone", default=f"dsa-{name}", help="shipped name, folder or Hub id")
        sub.add_argument("--config", type=Path, help="YAML with settings of PrepareConfig, over the domain's defaults")
        sub.add_argument("--seed", type=int, help="seeds split, meta-training and adaptation")

    sample = add("sample", _sample, "draw images as a user would: real, unadapted and personalised ones")
    sample.add_argument("bundle", help="folder, or 'image' for the shipped bundle")
    sample.add_argument("--user", help="whose (default: the first test user)")
    sample.add_argument("--count", type=int, default=10)
    sample.add_argument("--out", type=Path, default=Path("samples.png"))
    sample.add_argument("--seed", type=int, default=0)

    headroom = add("headroom", _headroom, "whether a bundle is worth a study: the ladder without an agent")
    headroom.add_argument("bundle", help="folder, or a domain's name for its shipped bundle")
    headroom.add_argument("--split", default="test")
    headroom.add_argument("--prices", type=float, nargs="+", help="lambda, as multiples of the domain's")
    headroom.add_argument("--granularity", nargs="+", help="of the gates (default: that of the library)")
    headroom.add_argument("--seed", type=int, default=0)
    headroom.add_argument("--plot", type=Path, default=Path("headroom.png"))
    headroom.add_argument("--json", type=Path, help="write the result here")

    table = add("table", _table, "measure losses under all masks, for table environments; a killed build continues")
    table.add_argument("bundle", help="folder, or a domain's name for its shipped bundle")
    table.add_argument("--split", default="train")
    table.add_argument("--granularity", help="of the gates, at most 16 (default: that of the library)")
    table.add_argument("--out", type=Path, required=True)

    docs = add("docs", _docs, "write the environments' pages")
    docs.add_argument("--out", type=Path, default=Path("docs/environments"))
    docs.add_argument("--seed", type=int, default=0)

    metrics = add("metrics", _metrics, "task metrics of a bundle's users: bare, shared, personalised and gated")
    metrics.add_argument("bundle", help="folder, or a domain's name for its shipped bundle")
    metrics.add_argument("--split", default="test")
    metrics.add_argument("--interactions", type=Path, help="recommendation: the bundle's data, for the baselines")
    metrics.add_argument("--style", action="store_true", help="images: whether a classifier knows the user by samples")
    metrics.add_argument("--seed", type=int, default=0, help="of the samples and their classifier")
    metrics.add_argument("--json", type=Path, help="write the result here")

    info = add("info", _info, "print a bundle's manifest in readable form")
    info.add_argument("bundle", help="folder, or a domain's name for its shipped bundle")
    info.add_argument("--json", action="store_true", help="print the whole manifest as JSON")

    train = add("train", _train, "train an agent; the same command continues a killed run")
    train.add_argument("--resume", type=Path, metavar="RUN", help="continue the run of this folder with its settings")
    train.add_argument("--env", default="DSA-Text-v0")
    train.add_argument("--bundle", help="folder of a bundle (default: the shipped one)")
    train.add_argument("--agent", default="ppo")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--logdir", type=Path, default=Path("runs"))
    _train_arguments(train)
    train.add_argument("--env-set", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of the environment")
    train.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="override the agent's settings")
    train.set_defaults(parser=train)

    imported = add("import", _import, "make a run of a policy that stable-baselines3's model.save wrote")
    imported.add_argument("zip", type=Path)
    imported.add_argument("--trust", action="store_true", help="you know who made it: it may run any code")
    imported.add_argument("--env", default="DSA-Text-v0", help="what it was trained on")
    imported.add_argument("--bundle", help="folder of a bundle (default: the shipped one)")
    imported.add_argument("--agent", default="ppo", help="the agent of its algorithm")
    imported.add_argument("--out", type=Path, required=True, metavar="RUN")

    compare = add("compare", _compare, "every agent on every environment with every seed; a killed grid continues")
    compare.add_argument("--env", nargs="+", required=True, metavar="ID")
    compare.add_argument("--agent", nargs="+", required=True, metavar="NAME")
    compare.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N - 1")
    compare.add_argument("--bundle", nargs="*", default=[], metavar="ENV=FOLDER", help="default: the shipped ones")
    compare.add_argument("--env-set", nargs="*", default=[], metavar="ENV.NAME=VALUE", help="arguments of environments")
    compare.add_argument("--set", nargs="*", default=[], metavar="AGENT.NAME=VALUE", help="override agents' settings")
    _train_arguments(compare)
    compare.add_argument("--agent-steps", nargs="*", default=[], metavar="AGENT=N", help="where they are not --steps")
    compare.add_argument("--engine", default="local", help="local, or ray: the cluster of RAY_ADDRESS or one here")
    compare.add_argument("--workers", type=int, help="cells at a time (default: one per core)")
    compare.add_argument("--retry-failed", action="store_true", help="try failed cells again")
    compare.add_argument("--out", type=Path, required=True, help="folder of the comparison")

    report = add("report", _report, "write a comparison's report: an HTML page, Markdown and pictures")
    report.add_argument("out", type=Path, metavar="DIR")

    verify = add("verify", _verify, "replay rows from their saved agents; refused ones end in exit code 1")
    verify.add_argument("row", type=Path, metavar="ROW", help="a row.json, its folder, or a comparison's folder")

    leaderboard = add("leaderboard", _leaderboard, "verify the rows of comparisons and write the leaderboard")
    leaderboard.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    leaderboard.add_argument("--out", type=Path, default=Path("LEADERBOARD.md"))

    evaluate = add("evaluate", _evaluate, "judge finished runs (several seeds of one configuration) by the ladder")
    evaluate.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    evaluate.add_argument("--split", default="test", help="test, validation or seen")
    evaluate.add_argument("--json", type=Path, help="write the result here")
    evaluate.add_argument("--plot", type=Path, help="write the plot here (default: RUN/ladder-SPLIT.png)")

    tune = add("tune", _tune, "search an agent's settings (Optuna); the same command continues a killed study")
    tune.add_argument("--agent", required=True)
    tune.add_argument("--env", default="DSA-Text-v0")
    tune.add_argument("--bundle", help="folder of a bundle (default: the shipped one)")
    tune.add_argument("--trials", type=int, default=30)
    tune.add_argument("--steps", type=int, default=300_000, help="environment steps of a seed")
    tune.add_argument("--seeds", type=int, default=2, help="seeds of a trial; their mean is its value")
    tune.add_argument("--seed", type=int, default=0, help="seeds the sampler")
    tune.add_argument("--evaluations", type=int, default=10, help="of a trial, on validation users")
    tune.add_argument("--num-envs", type=int, default=256)
    tune.add_argument("--granularity", default="pathway")
    tune.add_argument("--l0-penalty", type=float, default=None, help="price of an active parameter")
    tune.add_argument("--reward-metric", help="task metric in the place of minus the loss, such as ndcg@10")
    tune.add_argument("--env-set", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of the environment")
    tune.add_argument("--out", type=Path, required=True, help="folder of the study; one process works on it at a time")
    tune.add_argument("--write", action="store_true", help="put the best settings into agents/zoo/NAME.yaml here")

    push = add("push", _push, "publish a finished run on the Hugging Face Hub, with a model card")
    push.add_argument("run_folder", type=Path, metavar="RUN")
    push.add_argument("--repo", required=True, help="USER/NAME on the Hub")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--to", type=Path, help="write the files into this new folder and publish nothing")
    push.add_argument("--license", default="apache-2.0", help="of the agent, as the Hub spells it")

    pull = add("pull", _pull, "fetch a published run, check it and put it in place")
    pull.add_argument("repo", help="USER/NAME on the Hub")
    pull.add_argument("--out", type=Path, required=True, metavar="RUN", help="new folder of the run")
    pull.add_argument("--revision", help="branch, tag or commit")
    pull.add_argument("--bundle", help="folder of the bundle it was trained on (default: the shipped one)")

    bench = add("bench", _bench, "time the environment's step against the bare frozen backbone")
    bench.add_argument("--env", default="DSA-Text-v0")
    bench.add_argument("--bundle", help="folder of a bundle (default: the shipped one)")
    bench.add_argument("--rivals", action="store_true",
                       help="the text environment against Hugging Face, DummyVecEnv and peft; tables; PPO")  # fmt: skip
    bench.add_argument("--masked", action="store_true",
                       help="PPO under action masks against plain PPO and sb3-contrib's MaskablePPO")  # fmt: skip
    bench.add_argument("--num-envs", type=int, default=64)
    bench.add_argument("--repetitions", type=int, default=30)
    bench.add_argument("--seed", type=int, default=0)
    bench.add_argument("--json", type=Path, help="write the result here")
    return parser


def _personas(parsed: argparse.Namespace) -> None:
    from dsa_gym.generators.personas import PersonaConfig, write_personas

    config = PersonaConfig(
        users=parsed.users,
        min_texts=parsed.min_texts,
        max_texts=parsed.max_texts,
        user_similarity=parsed.user_similarity,
        register_similarity=parsed.register_similarity,
        odd_spelling=parsed.odd_spelling,
        seed=parsed.seed,
    )
    rows = write_personas(config, parsed.out)
    console.print(f"{rows:,} texts of {parsed.users} users in {parsed.out}")


def _tastes(parsed: argparse.Namespace) -> None:
    from dsa_gym.generators.tastes import TasteConfig, write_tastes, write_titles

    config = TasteConfig(users=parsed.users, items=parsed.items, odd=parsed.odd, seed=parsed.seed)
    rows = write_tastes(config, parsed.out)
    if parsed.titles:
        write_titles(config, parsed.titles)
    console.print(f"{rows:,} interactions of {parsed.users} users in {parsed.out}")


def _hands(parsed: argparse.Namespace) -> None:
    from dsa_gym.generators.hands import HandConfig, write_hands

    config = HandConfig(users=parsed.users, per_user=parsed.per_user, odd=parsed.odd, seed=parsed.seed)
    rows = write_hands(config, parsed.out)
    console.print(f"{rows:,} drawings of {parsed.users} users in {parsed.out}")


def _interaction_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="MovieLens, MovieTweetings, Amazon, table")
    parser.add_argument("--source", default="auto", help="format of the data")
    parser.add_argument("--min-rating", type=float, help="leave out ratings below")
    parser.add_argument("--user-core", type=int, default=10, help="fewest interactions of a user")
    parser.add_argument("--item-core", type=int, default=5, help="fewest interactions of an item")


def _image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="a folder per user, NPZ, or a table of images")
    parser.add_argument("--source", default="auto", help="folder, npz or table")
    parser.add_argument("--download", action="store_true", help="fetch images that a table gives by URL")


def _read_interactions(parsed: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    from dsa_gym.data import read_interactions

    users, report = read_interactions(
        parsed.data,
        source=parsed.source,
        min_rating=parsed.min_rating,
        user_core=parsed.user_core,
        item_core=parsed.item_core,
    )
    console.print(f"read: {report}")
    return users, asdict(report)


def _read_images(parsed: argparse.Namespace, size: int, channels: int) -> tuple[Any, dict[str, Any]]:
    from dsa_gym.data import read_images

    users, report = read_images(
        parsed.data, source=parsed.source, size=size, channels=channels, download=parsed.download
    )
    console.print(f"read: {report}")
    return users, asdict(report)


def _pretrain_config(parsed: argparse.Namespace, kind: type[T]) -> T:
    from dsa_gym.config import read_config

    config = read_config(parsed.config, kind) if parsed.config else kind()
    given = {name: value for name in ("steps", "seed") if (value := getattr(parsed, name)) is not None}
    return replace(config, **given)  # type: ignore[type-var]


def _pretrain_text(parsed: argparse.Namespace) -> None:
    from dsa_gym.pretrain.text import PretrainConfig, pretrain_text

    result = pretrain_text(parsed.corpus, parsed.out, _pretrain_config(parsed, PretrainConfig))
    console.print(f"held-out perplexity {result['held_out_perplexity']:.2f}; weights and model card in {parsed.out}")


def _pretrain_recommendation(parsed: argparse.Namespace) -> None:
    from dsa_gym.data import read_titles
    from dsa_gym.pretrain.recommendation import RecommendationPretrainConfig, pretrain_recommendation

    config = _pretrain_config(parsed, RecommendationPretrainConfig)
    users, report = _read_interactions(parsed)
    titles = read_titles(parsed.titles) if parsed.titles else None
    result = pretrain_recommendation(users, parsed.out, config, titles=titles, data_files=parsed.data, report=report)
    for split in ("unseen", "seen"):
        scores = "  ".join(f"{name} {values['ndcg@10']:.4f}" for name, values in result[split].items())
        console.print(f"NDCG@10, last item, {split} users: {scores}")
    console.print(f"weights and model card in {parsed.out}")


def _pretrain_image(parsed: argparse.Namespace) -> None:
    from dsa_gym.pretrain.image import ImagePretrainConfig, pretrain_image

    config = _pretrain_config(parsed, ImagePretrainConfig)
    users, report = _read_images(parsed, parsed.size, parsed.channels)
    result = pretrain_image(users, parsed.out, config, data_files=[parsed.data], report=report)
    console.print(f"denoising error {result['unseen']:.4f} on unseen users; weights and model card in {parsed.out}")


def _prepare_config(parsed: argparse.Namespace) -> PrepareConfig:
    from dsa_gym.prepare import prepare_config

    config = prepare_config(parsed.domain, parsed.config)
    if parsed.seed is None:
        return config
    return replace(
        config,
        splits=replace(config.splits, seed=parsed.seed),
        library=replace(config.library, seed=parsed.seed),
        adaptation=replace(config.adaptation, seed=parsed.seed),
    )


def _prepare(
    parsed: argparse.Namespace,
    config: PrepareConfig,
    raw: list[tuple[str, Any]],
    files: list[Path],
    reading: dict[str, Any],
) -> None:
    from dsa_gym.prepare import prepare

    bundle = prepare(
        parsed.domain, raw, parsed.out, config, backbone=parsed.backbone, data_files=files, reading=reading
    )
    _print_manifest(bundle.manifest, str(parsed.out))


def _prepare_text(parsed: argparse.Namespace) -> None:
    from dsa_gym.data import Scrubber, read_texts

    config = _prepare_config(parsed)
    columns = {name: getattr(parsed, name) for name in ("user_column", "text_column", "order_column")}
    scrubber = Scrubber(parsed.scrub) if parsed.scrub else None
    users = read_texts(parsed.data, source=parsed.source, scrub=scrubber, **columns)
    replaced = dict(scrubber.counts) if scrubber else {}
    if replaced:
        console.print(f"replaced: {replaced}")
    _prepare(parsed, config, [(entry.user, entry.texts) for entry in users], parsed.data, {"replaced": replaced})


def _prepare_recommendation(parsed: argparse.Namespace) -> None:
    from dsa_gym.domains import make_domain

    config = _prepare_config(parsed)
    domain: Any = make_domain(parsed.domain, config.domain, backbone_source=parsed.backbone)
    users, report = _read_interactions(parsed)
    raw = [(entry.user, domain.windows(entry.items, entry.times)) for entry in users]
    _prepare(parsed, config, raw, parsed.data, report)


def _prepare_image(parsed: argparse.Namespace) -> None:
    from dsa_gym.domains import make_domain
    from dsa_gym.domains.image import ImageExample

    config = _prepare_config(parsed)
    domain: Any = make_domain(parsed.domain, config.domain, backbone_source=parsed.backbone)
    users, report = _read_images(parsed, domain.size, domain.channels)
    raw = [
        (entry.user, [ImageExample(*pair) for pair in zip(entry.images, entry.conditions, strict=True)])
        for entry in users
    ]
    _prepare(parsed, config, raw, [parsed.data], report)


def _sample(parsed: argparse.Namespace) -> None:
    from PIL import Image

    from dsa_gym.bundle import Bundle
    from dsa_gym.experiments.samples import sample_sheet
    from dsa_gym.storage import atomic_path

    bundle = Bundle.open(parsed.bundle)
    user = parsed.user or bundle.users[bundle.manifest["groups"].index("test")]
    sheet = sample_sheet(bundle, user, count=parsed.count, seed=parsed.seed)
    with atomic_path(parsed.out) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")
    console.print(f"sheet: {parsed.out}")


def _metrics(parsed: argparse.Namespace) -> None:
    from dsa_gym.bundle import Bundle
    from dsa_gym.experiments.task_metrics import show, task_metrics
    from dsa_gym.storage import write_json

    bundle = Bundle.open(parsed.bundle)
    result = task_metrics(bundle, parsed.split, interactions=parsed.interactions)
    show(result, console)
    if parsed.style:
        from dsa_gym.experiments.samples import judge_style, show_style

        result["style"] = judge_style(bundle, seed=parsed.seed)
        show_style(result["style"], console)
    if parsed.json:
        write_json(parsed.json, result)
        console.print(f"json: {parsed.json}")


def _headroom(parsed: argparse.Namespace) -> None:
    from dsa_gym.bundle import Bundle
    from dsa_gym.experiments.headroom import PRICES, headroom, plot, show
    from dsa_gym.storage import write_json

    result = headroom(
        Bundle.open(parsed.bundle),
        parsed.split,
        prices=parsed.prices or PRICES,
        granularities=parsed.granularity or (),
        seed=parsed.seed,
    )
    show(result, console)
    plot(result, parsed.plot)
    console.print(f"plot: {parsed.plot}")
    if parsed.json:
        write_json(parsed.json, result)
        console.print(f"json: {parsed.json}")


def _table(parsed: argparse.Namespace) -> None:
    from dsa_gym.bundle import Bundle
    from dsa_gym.problem import GatingProblem
    from dsa_gym.tables import build_table

    bundle = Bundle.open(parsed.bundle)
    problem = GatingProblem(bundle, parsed.split, granularity=parsed.granularity, cache_bytes=0)
    console.print(f"table: {build_table(problem, parsed.out, key={'bundle': bundle.checksum})}")


def _docs(parsed: argparse.Namespace) -> None:
    from dsa_gym.experiments.docs import write_pages

    console.print(f"{len(write_pages(parsed.out, seed=parsed.seed))} files in {parsed.out}")


def _info(parsed: argparse.Namespace) -> None:
    from dsa_gym.bundle import Bundle

    manifest = Bundle.open(parsed.bundle).manifest
    if parsed.json:
        print(json.dumps(manifest, indent=2))
    else:
        _print_manifest(manifest, parsed.bundle)


def _print_manifest(manifest: dict[str, Any], name: str) -> None:
    from rich.table import Table

    groups = manifest["groups"]
    stored, personal = manifest["stored"], manifest["personalisation"]
    table = Table(title=f"bundle {name}", show_header=False)
    size = sum(2 * site["width"] * manifest["adapter"]["rank"] for site in manifest["adapter"]["sites"])
    rows = [
        ("domain", f"{manifest['domain']['name']} {manifest['domain']['settings']}"),
        ("backbone", manifest["backbone"]["source"]),
        ("users", ", ".join(f"{groups.count(group)} {group}" for group in ("train", "validation", "test"))),
        ("dropped", f"{manifest['encoding']['users_dropped']} users, "
                    f"{manifest['encoding']['examples_unusable']} examples"),
        ("adapter", f"{len(manifest['adapter']['sites'])} sites, {size:,} parameters, "
                    f"{manifest['adapter']['pathways']} pathways, trained under {manifest['granularity']!r} gates"),
        ("stored per user", f"{stored['bytes_per_user']:,.0f} bytes, {stored['numbers_per_user']:,} numbers "
                            f"(dense fp16 adapter: {stored['dense_fp16_bytes']:,} bytes)"),
    ]  # fmt: skip
    for split in ("test", "seen"):
        ladder = manifest["headroom"][split]["ladder"]
        rows.append((f"reward, {split}", "  ".join(f"{rung} {ladder[rung]['mean']:.4f}" for rung in ladder)))
        headroom = manifest["headroom"][split]["headroom"]
        bounds = f"[{headroom['low']:.4f}, {headroom['high']:.4f}]"
        rows.append(
            (f"headroom, {split}", f"{headroom['mean']:.4f} {manifest['headroom'].get('unit', 'nats')} {bounds}")
        )
    losses = ("no_adapter", "shared", "dense", "sparse", "wrong_user", "random_initialisation")
    rows.append(("unseen users' loss", "  ".join(f"{key} {personal[key]:.4f}" for key in losses)))
    timings = manifest["timings_seconds"]
    rows.append(("seconds", "  ".join(f"{stage} {seconds:.0f}" for stage, seconds in timings.items())))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=500_000, help="environment steps")
    parser.add_argument("--num-envs", type=int, default=256)
    parser.add_argument("--granularity", default="pathway")
    parser.add_argument("--l0-penalty", type=float, default=None, help="price of an active parameter")
    parser.add_argument("--reward-metric", help="task metric in the place of minus the loss, such as ndcg@10")
    parser.add_argument("--evaluate-every", type=int, default=50_000, help="environment steps")


TRAIN_OPTIONS = ("steps", "num_envs", "granularity", "l0_penalty", "reward_metric", "evaluate_every")
"""Options that :func:`_train_arguments` adds, by their names in ``TrainConfig``."""


def _train(parsed: argparse.Namespace) -> None:
    from dsa_gym.experiments.train import read_manifest, resume, train

    if parsed.resume is None:
        run = train(_train_config(parsed), parsed.logdir)
    else:
        others = ("env", "bundle", "agent", "seed", "logdir", "set", "env_set", *TRAIN_OPTIONS)
        given = [name for name in others if getattr(parsed, name) != parsed.parser.get_default(name)]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')}: not with --resume, which takes the run's own settings")
        if "scores" in read_manifest(parsed.resume):
            console.print(f"finished already: {parsed.resume}")
        run = resume(parsed.resume)
    console.print(f"run: {run}\nnext: dsa-gym evaluate {run}\n      tensorboard --logdir {run.parent}")


def _import(parsed: argparse.Namespace) -> None:
    from dsa_gym.experiments.train import TrainConfig, import_zip

    bundle = str(Path(parsed.bundle).resolve()) if parsed.bundle else None
    config = TrainConfig(env=parsed.env, agent=parsed.agent, bundle=bundle)
    run = import_zip(parsed.zip, config, parsed.out, trust=parsed.trust)
    console.print(f"run: {run}\nnext: dsa-gym evaluate {run}")


def _train_config(parsed: argparse.Namespace) -> TrainConfig:
    from dsa_gym.agents import agent_class
    from dsa_gym.experiments.train import TrainConfig

    agent_class(parsed.agent)  # an unknown one is named before its settings are
    return TrainConfig(
        env=parsed.env,
        agent=parsed.agent,
        bundle=str(Path(parsed.bundle).resolve()) if parsed.bundle else None,
        seed=parsed.seed,
        settings=_agent_settings(parsed.agent, parsed.set),
        env_settings=_env_settings(parsed.env_set),
        **{name: getattr(parsed, name) for name in TRAIN_OPTIONS},
    )


def _agent_settings(agent: str, texts: Sequence[str]) -> dict[str, Any]:
    from dsa_gym.agents.base import zoo_defaults
    from dsa_gym.config import parse_setting

    try:
        return dict(parse_setting(text, zoo_defaults(agent)) for text in texts)
    except ValueError as error:
        raise ValueError(f"--set: {error}") from error


def _env_settings(texts: Sequence[str]) -> dict[str, Any]:
    from dsa_gym.config import parse_value

    try:
        return dict(parse_value(text) for text in texts)
    except ValueError as error:
        raise ValueError(f"--env-set: {error}") from error


def _compare(parsed: argparse.Namespace) -> int:
    from dsa_gym.experiments.compare import compare
    from dsa_gym.experiments.report import report

    failed = compare(
        _grid(parsed), parsed.out, engine=parsed.engine, workers=parsed.workers, retry_failed=parsed.retry_failed
    )
    console.print(f"rows: {parsed.out / 'rows.parquet'} and {parsed.out / 'rows.csv'}")
    try:
        console.print(f"report: {report(parsed.out)}")
    except (ImportError, ValueError) as error:  # rows are there without it, or no cell is finished
        print(f"dsa-gym compare: no report: {error}", file=sys.stderr)
    for cell, message in failed.items():
        print(f"failed: {cell}: {message}", file=sys.stderr)
    if failed:
        traceback = parsed.out / "cells" / next(iter(failed)) / "error.txt"
        print(
            f"{len(failed)} failed, see {traceback}; the same command with --retry-failed tries again", file=sys.stderr
        )
    return 1 if failed else 0


def _grid(parsed: argparse.Namespace) -> Grid:
    from dsa_gym.agents import agent_class
    from dsa_gym.experiments.compare import Grid
    from dsa_gym.experiments.train import check_env

    for name in parsed.env:
        check_env(name)
    for name in parsed.agent:
        agent_class(name)
    settings = _by_owner(parsed.set, ".", parsed.agent, "--set")
    envs: dict[str, dict[str, Any]] = {name: {} for name in parsed.env}
    for name, folders in _by_owner(parsed.bundle, "=", parsed.env, "--bundle").items():
        envs[name]["bundle"] = str(Path(folders[-1]).resolve())
    for name, texts in _by_owner(parsed.env_set, ".", parsed.env, "--env-set").items():
        envs[name]["env_settings"] = _env_settings(texts)
    agents = {name: _agent_settings(name, settings.get(name, [])) for name in parsed.agent}
    options = {name: getattr(parsed, name) for name in TRAIN_OPTIONS}
    steps = _by_owner(parsed.agent_steps, "=", parsed.agent, "--agent-steps")
    return Grid(envs, agents, parsed.seeds, options, {name: _count(texts[-1]) for name, texts in steps.items()})


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--agent-steps: {text!r}, expected a positive number")
    return int(text)


def _by_owner(texts: Sequence[str], separator: str, owners: Sequence[str], option: str) -> dict[str, list[str]]:
    """Texts of an owner, a separator and the rest, as owner to rests.

    Raises:
        ValueError: If an owner is not compared.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        owner, _, rest = text.partition(separator)
        if owner not in owners or not rest:
            raise ValueError(f"{option} {text!r}: expected one of {', '.join(owners)}, then {separator!r} and the rest")
        found.setdefault(owner, []).append(rest)
    return found


def _report(parsed: argparse.Namespace) -> None:
    from dsa_gym.experiments.report import report

    console.print(f"report: {report(parsed.out)}")


def _verify(parsed: argparse.Namespace) -> int:
    from dsa_gym.experiments.verify import verify

    checked = verify(parsed.row)
    for run, reason in checked.items():
        print(f"reproduced: {run}" if reason is None else f"refused: {run}: {reason}")
    return 1 if any(checked.values()) else 0


def _leaderboard(parsed: argparse.Namespace) -> int:
    from dsa_gym.experiments.leaderboard import leaderboard

    refused = leaderboard(parsed.folders, parsed.out)
    console.print(f"leaderboard: {parsed.out}")
    for run, reason in refused.items():
        print(f"refused: {run}: {reason}", file=sys.stderr)
    return 1 if refused else 0


def _evaluate(parsed: argparse.Namespace) -> None:
    from dsa_gym.experiments.evaluate import evaluate, plot, show
    from dsa_gym.storage import write_json

    result = evaluate(parsed.runs, parsed.split)
    show(result, console)
    picture = parsed.plot or parsed.runs[0] / f"ladder-{parsed.split}.png"
    plot(result, picture)
    console.print(f"plot: {picture}")
    if parsed.json:
        write_json(parsed.json, result)
        console.print(f"json: {parsed.json}")


def _tune(parsed: argparse.Namespace) -> None:
    from dsa_gym.experiments.train import TrainConfig
    from dsa_gym.experiments.tune import TuneConfig, fragment, merged, show, tune, zoo_file
    from dsa_gym.storage import write_text

    destination = zoo_file(parsed.agent) if parsed.write else None
    run = TrainConfig(
        env=parsed.env,
        agent=parsed.agent,
        bundle=str(Path(parsed.bundle).resolve()) if parsed.bundle else None,
        env_settings=_env_settings(parsed.env_set),
        **_named(parsed, "steps", "num_envs", "granularity", "l0_penalty", "reward_metric"),
    )
    config = TuneConfig(run, parsed.trials, parsed.seeds, parsed.seed, parsed.evaluations)
    record = tune(config, parsed.out, command=shlex.join(["dsa-gym", *parsed.arguments]))
    show(record, console)
    console.print(f"best settings: {parsed.out / 'best.yaml'}; all trials: {parsed.out / 'study.json'}\n"
                  f"plots: {parsed.out / 'importance.png'} and {parsed.out / 'history.png'}")  # fmt: skip
    if destination is not None:
        write_text(destination, merged(destination.read_text(encoding="utf-8"), fragment(record)))
        console.print(f"written into {destination}")


def _push(parsed: argparse.Namespace) -> None:
    from dsa_gym.experiments.hub import push

    console.print(f"published: {push(parsed.run_folder, parsed.repo, **_named(parsed, 'private', 'to', 'license'))}")


def _pull(parsed: argparse.Namespace) -> None:
    from dsa_gym.experiments.hub import pull

    run = pull(parsed.repo, parsed.out, **_named(parsed, "revision", "bundle"))
    console.print(f"run: {run}\nnext: dsa-gym evaluate {run}")


def _named(parsed: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(parsed, name) for name in names}


def _demo(parsed: argparse.Namespace) -> None:
    from dsa_gym.experiments.evaluate import evaluate, plot, show
    from dsa_gym.experiments.train import TrainConfig, train
    from dsa_gym.storage import write_json

    console.print("Training PPO on DSA-Text-v0 with the bundled persona text ...")
    run = train(TrainConfig(steps=parsed.steps, seed=parsed.seed), parsed.out)
    result = evaluate([run])
    show(result, console)
    plot(result, parsed.out / "report.png")
    write_json(parsed.out / "report.json", result)
    console.print(
        f"report: {parsed.out / 'report.png'} and {parsed.out / 'report.json'}\n"
        f"TensorBoard: tensorboard --logdir {parsed.out}"
    )


def _bench(parsed: argparse.Namespace) -> None:
    from dsa_gym.experiments.bench import bench, show
    from dsa_gym.storage import write_json

    if parsed.rivals:
        from dsa_gym.experiments import rivals

        result = rivals.rivals(repetitions=parsed.repetitions, seed=parsed.seed)
        rivals.show(result, console)
    elif parsed.masked:
        from dsa_gym.experiments import masked_bench

        result = masked_bench.masked_bench(repetitions=parsed.repetitions, seed=parsed.seed)
        masked_bench.show(result, console)
    else:
        result = bench(parsed.env, parsed.bundle, parsed.num_envs, parsed.repetitions, parsed.seed)
        show(result, console)
    if parsed.json:
        write_json(parsed.json, result)
        console.print(f"json: {parsed.json}")


if __name__ == "__main__":
    sys.exit(main())
