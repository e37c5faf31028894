"""What a run writes for TensorBoard: what the policy does, what it uses, and how well it does.

Gate by gate and per evaluation, all on fixed inputs:

| tag | what |
|---|---|
| ``seen/``, ``unseen/`` | loss, penalty, reward, density, normalised score, regret; gain over the best static mask |
| ``uses/`` | information on user and input (nats per gate), score with masks of other users and of other inputs |
| ``policy/`` | entropy per gate, divergence from the evaluation before, mean, least and most active gate |
| ``diversity/`` | distinct masks, entropy of the masks (nats), mean distance of two masks (gates) |
| ``oracle/`` | precision and recall against the best masks, where those are known |
| ``gate_*/`` | the same of single gates, the first :data:`GATES_SHOWN` |

Images, examples and the projector's users are written at evaluations 1, 2, 4, 8, ... and at the last one.
"""

from __future__ import annotations

import functools
import hashlib
import html
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tensorboard.plugins.projector import ProjectorConfig
from tensorboard.plugins.projector.metadata import PROJECTOR_FILENAME
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dsa_gym import storage
from dsa_gym.agents.base import Agent
from dsa_gym.experiments import policy_analysis as analysis
from dsa_gym.experiments.monitor import Monitor
from dsa_gym.experiments.policy_analysis import Floats
from dsa_gym.ladder import bootstrap, interval, normalised_score, shuffled
from dsa_gym.planted import PlantedProblem
from dsa_gym.problem import Bits
from dsa_gym.search import Problem, oracle

GATES_SHOWN = 64
"""Gates that have charts of their own."""

EXAMPLES = 3
"""Inputs in the text panel."""


class Policy(Protocol):
    """What is watched: an :class:`dsa_gym.agents.base.Agent` or a model of stable-baselines3."""

    @property
    def steps(self) -> int:
        """Environment steps learned so far."""
        ...

    def masks(self, scorer: Any) -> Bits:
        """Decisions for all inputs of a split, (n, G)."""
        ...

    def probabilities(self, observation: dict[str, NDArray[np.float32]]) -> Floats | None:
        """Probability that each gate is on, (rows, G); None of a policy that has none."""
        ...


class PolicyLog:
    """TensorBoard events of one run."""

    def __init__(self, folder: Path, monitor: Monitor, policy: Policy, *, decode: bool = True) -> None:
        """Open the event file and arrange the dashboards.

        Args:
            folder: The run.
            monitor: Has the inputs on which the policy is watched.
            policy: The policy as it is now: later events than its steps, of a run that was killed, are hidden, and the
                first divergence is measured from it.
            decode: Whether the text panel shows what the model makes of the examples, for which it is loaded.
        """
        # events at `start` itself were written before the checkpoint and stay
        start = policy.steps
        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else 0)
        self._folder, self._monitor, self._decode = Path(folder), monitor, decode
        self._problem = monitor.problems["unseen"]
        self._best = oracle(self._problem) if self._problem.optimum_known else None
        self._static = {
            name: problem.rewards(np.arange(len(problem)), np.tile(monitor.static, (len(problem), 1)))
            for name, problem in monitor.problems.items()
        }
        self._before = _probabilities(policy, self._problem)
        self._panel = ExamplePanel(self._problem)
        self._evaluations = 0
        self._writer.add_custom_scalars(layout(optimum_known=self._best is not None))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write scalars; those that are not a number are left out."""
        for name, value in values.items():
            if not np.isnan(value):
                self._writer.add_scalar(name, value, step)

    def evaluation(
        self, policy: Policy, scalars: dict[str, float], decisions: dict[str, Bits], *, last: bool = False
    ) -> None:
        """Write an evaluation.

        Args:
            policy: The policy.
            scalars: Its scores, as the monitor gave them.
            decisions: Its masks, as the monitor gave them.
            last: Whether it is the last evaluation of the run.
        """
        began = time.perf_counter()
        step, masks = policy.steps, decisions["unseen"]
        self._evaluations += 1
        thorough = last or self._evaluations & (self._evaluations - 1) == 0
        probabilities = _probabilities(policy, self._problem)
        self.scalars(step, scalars | self._gains(decisions))
        self._gates(step, masks, probabilities)
        kinds = analysis.diversity(masks)
        self.scalars(step, {f"diversity/{name}": value for name, value in kinds._asdict().items()})
        if thorough or self._problem.optimum_known:  # elsewhere every mask costs a forward of the model
            self.scalars(step, self._controls(masks, scalars["unseen/normalized_score"]))
        if thorough:
            self._images(step, masks)
            self._users(decisions)
            self._panel.write(self._writer, step, masks, decode=self._decode)
        self.scalars(step, {"time/analysis_seconds": time.perf_counter() - began})
        self._writer.flush()

    def hparams(self, settings: dict[str, Any], scores: dict[str, float]) -> None:
        """Write the hyperparameters, name the scores that runs are filtered by, and close.

        The values of the scores are those of the scalars with the same names at the last evaluation.
        """
        plain = {
            name: value if isinstance(value, int | float | str) and not isinstance(value, bool) else str(value)
            for name, value in settings.items()
        }
        # the dashboard shows the first few: what runs are compared by
        names = sorted(scores, key=lambda name: (not name.endswith("normalized_score"), not name.startswith("unseen")))
        for summary in hparams(plain, {name: scores[name] for name in names}):
            self._writer._get_file_writer().add_summary(summary)
        self._writer.close()

    def _gains(self, decisions: dict[str, Bits]) -> dict[str, float]:
        """Gain over the best static mask, with its 95 % interval over users."""
        gains: dict[str, float] = {}
        for name, problem in self._monitor.problems.items():
            gain = problem.rewards(np.arange(len(problem)), decisions[name]) - self._static[name]
            drawn = bootstrap({"gain": gain}, problem.user.numpy(), samples=500)["gain"]
            found = interval(gain.mean(), drawn)
            gains |= {f"{name}/gain_over_static{end}": found[key] for key, end in _INTERVAL.items()}
        return gains

    def _gates(self, step: int, masks: Bits, probabilities: Floats | None) -> None:
        """Write what there is to say gate by gate, and its means."""
        rate = masks.mean(0)
        told = analysis.information(
            masks.astype(np.float64) if probabilities is None else probabilities, self._problem.user.numpy()
        )
        gates = {"activation": rate, "user_information": told.user, "input_information": told.input}
        means = {"uses/user_information": told.user.mean(), "uses/input_information": told.input.mean()}
        means |= {"policy/activation": rate.mean(), "policy/least_active": rate.min(), "policy/most_active": rate.max()}
        if probabilities is not None:
            gates["entropy"] = analysis.bernoulli_entropy(probabilities).mean(0)
            before = probabilities if self._before is None else self._before
            gates["kl"] = analysis.bernoulli_kl(*(np.clip(p, 1e-6, 1 - 1e-6) for p in (probabilities, before))).mean(0)
            means |= {"policy/entropy_per_gate": gates["entropy"].mean(), "policy/kl_per_gate": gates["kl"].mean()}
            self._before = probabilities
        if self._best is not None:
            gates |= analysis.agreement(masks, self._best)._asdict()
            pooled = analysis.overall_agreement(masks, self._best)
            means |= {"oracle/precision": pooled[0], "oracle/recall": pooled[1]}
        single = {
            f"gate_{name}/{gate}": value
            for name, values in gates.items()
            for gate, value in enumerate(values[:GATES_SHOWN])
        }
        self.scalars(step, {name: float(value) for name, value in (means | single).items()})

    def _controls(self, masks: Bits, score: float) -> dict[str, float]:
        """Normalised score of the policy and of its masks given to other users' inputs, and to any other inputs."""
        problem, found = self._problem, {"uses/score": score}
        for over in ("users", "inputs"):
            if over == "inputs" or len(problem.user.unique()) > 1:
                repeats = 8 if problem.optimum_known else 1
                reward = shuffled(problem, masks, over=over, repeats=repeats).mean()
                found[f"uses/score_shuffled_{over}"] = normalised_score(reward, *self._monitor.ends["unseen"])
        return found

    def _images(self, step: int, masks: Bits) -> None:
        """Draw how often each gate is on for each user, and each pathway or component at each site."""
        users = analysis.by_user(masks, self._problem.user.numpy())
        names = [_user_name(self._problem, user) for user in users.user]
        gates = [str(gate) for gate in range(masks.shape[1])]
        picture = heatmap(users.rate, names, gates, across="gates")
        self._writer.add_image("gates/users", picture, step, dataformats="HWC")
        values, rows, across = activation_map(self._problem, masks.mean(0))
        columns = [str(column) for column in range(values.shape[1])]
        picture = heatmap(values, rows, columns, across=across)
        self._writer.add_image("gates/sites", picture, step, dataformats="HWC")

    def _users(self, decisions: dict[str, Bits]) -> None:
        """Write the users' embeddings for the projector, coloured by the mask that each gets most often."""
        embeddings, rows, frequent = [], [], []
        for split, problem in self._monitor.problems.items():
            users = analysis.by_user(decisions[split], problem.user.numpy())
            embeddings.append(problem.observations["user"][users.first])
            frequent.append(users.frequent)
            sizes = problem.sizes / problem.sizes.sum()
            rows += [
                (_user_name(problem, user), split, mask_name(mask), f"{density:.3f}")
                for user, mask, density in zip(users.user, users.frequent, users.rate @ sizes, strict=True)
            ]
        write_projector(self._folder, np.concatenate(embeddings), rows, np.concatenate(frequent))


_INTERVAL = {"mean": "", "low": "_low", "high": "_high"}


def _probabilities(policy: Policy, problem: Problem) -> Floats | None:
    """The policy's probabilities on a problem's inputs; None if it has none but its decisions."""
    if isinstance(policy, Agent) and type(policy).probabilities is Agent.probabilities:
        return None
    return policy.probabilities(problem.observations)


def layout(*, optimum_known: bool) -> dict[str, dict[str, list[Any]]]:
    """The custom scalars dashboard: category to chart to kind and tags (regular expressions for ``Multiline``)."""

    def lines(*tags: str) -> list[Any]:
        return ["Multiline", [f"^{tag}$" for tag in tags]]

    def both(name: str) -> list[Any]:
        return lines(f"unseen/{name}", f"seen/{name}")

    # titles of more than a line would cover the charts
    quality = {"Score: 0 best static, 1 reference": both("normalized_score")}
    for part in ("unseen", "seen"):
        tags = [f"{part}/gain_over_static{end}" for end in _INTERVAL.values()]
        quality[f"Gain over static, {part}, 95 %"] = ["Margin", tags]
    uses = {
        "Information in a gate (nats)": lines("uses/user_information", "uses/input_information"),
        "Score with the masks of others": lines(
            "uses/score", "uses/score_shuffled_users", "uses/score_shuffled_inputs"
        ),
        "Distinct masks": lines("diversity/distinct"),
        "Entropy of masks (nats)": lines("diversity/entropy"),
        "Distance of two masks (gates)": lines("diversity/hamming"),
    }
    gates = {
        "Activation: mean, least, most": [
            "Margin",
            ["policy/activation", "policy/least_active", "policy/most_active"],
        ],
        "Activation": lines("gate_activation/.*"),
        "Entropy (nats)": lines("gate_entropy/.*"),
        "KL from the evaluation before": lines("gate_kl/.*"),
        "Information on the user (nats)": lines("gate_user_information/.*"),
        "Information on the input (nats)": lines("gate_input_information/.*"),
    }
    if optimum_known:
        quality["Regret"] = both("regret")
        uses["Agreement with the best masks"] = lines("oracle/precision", "oracle/recall")
        gates |= {"Precision": lines("gate_precision/.*"), "Recall": lines("gate_recall/.*")}
    return {
        "Policy quality": quality,
        "Reward parts": {
            "Reward": both("reward"),
            "Loss": both("loss"),
            "Penalty": both("penalty"),
            "Density": both("density"),
        },
        "What the policy uses": uses,
        "Gates": gates,
        "Training": {
            "Losses": lines("train/.*loss"),
            "Entropy and KL per gate (nats)": lines("policy/.*_per_gate"),
            "Seconds of an analysis": lines("time/analysis_seconds"),
        },
    }


def activation_map(problem: Problem, rate: Floats) -> tuple[Floats, list[str], str]:
    """How often each place is on, as a picture.

    Args:
        problem: Says what the gates switch.
        rate: How often each gate is on, (G,).

    Returns:
        Values (rows, columns) in [0, 1], the rows' names, and what the columns are: sites by pathways (by components,
        where gates are finer than pathways), or channels by positions of a planted instance.
    """
    if isinstance(problem, PlantedProblem):
        values = rate.reshape(-1, problem.config.channel_size)
        return values, [f"channel {channel}" for channel in range(len(values))], "positions"
    shape = problem.bundle.shape
    shares = problem.space.component_shares(torch.from_numpy(rate[None]))[0].numpy()  # (sites, rank)
    names = [f"layer {site.layer} {site.kind.replace('_', ' ')}" for site in shape.sites]
    if problem.space.granularity in ("component", "element"):
        return shares, names, "components"
    return shares[:, :: shape.rank // shape.pathways], names, "pathways"


def heatmap(values: Floats, rows: Sequence[str], columns: Sequence[str], *, across: str) -> NDArray[np.uint8]:
    """Draw values (rows, columns) in [0, 1] with names and a scale, (H, W, 3).

    Not with matplotlib: its layout takes a third of a second, which is more than all the rest of an evaluation.
    """
    height, width = values.shape
    cell = int(np.clip(768 // max(height, width), 2, 20))
    named = {"rows": cell >= _FONT_SIZE, "columns": cell >= _text_width(columns[-1])}
    left = max((_text_width(name) for name in rows), default=0) + 2 * _MARGIN if named["rows"] else _MARGIN
    top = _FONT_SIZE * (3 if named["columns"] else 2) + _MARGIN
    right, bottom = left + cell * width, top + cell * height
    image = Image.new("RGB", (max(right + 42, left + _text_width(across)), max(bottom, top + 80) + _MARGIN), "white")
    draw = ImageDraw.Draw(image)
    image.paste(_coloured(values, cell), (left, top))
    draw.text((left, _MARGIN), across, "black", _font())
    if named["rows"]:
        for row, name in enumerate(rows):
            draw.text((left - _MARGIN, top + cell * (row + 0.5)), name, "black", _font(), anchor="rm")
    if named["columns"]:
        for column, name in enumerate(columns):
            draw.text((left + cell * (column + 0.5), top - 3), name, "black", _font(), anchor="ms")
    image.paste(_coloured(np.linspace(1, 0, 64)[:, None], 1).resize((12, 64)), (right + 12, top + 8))
    for text, y in (("1", top + 8), ("0", top + 72)):
        draw.text((right + 30, y), text, "black", _font(), anchor="lm")
    return np.asarray(image).copy()


def _coloured(values: Floats, cell: int) -> Image.Image:
    """Values in [0, 1] as squares of ``cell`` pixels."""
    colours = (255 * matplotlib.colormaps["viridis"](values)[..., :3]).round().astype(np.uint8)
    return Image.fromarray(colours.repeat(cell, 0).repeat(cell, 1))


_FONT_SIZE, _MARGIN = 12, 8  # pixels


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    """A font that ships with matplotlib."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), _FONT_SIZE)


def _text_width(text: str) -> int:
    return int(np.ceil(_font().getlength(text)))


def mask_name(mask: Bits) -> str:
    """Short name of a mask (G,): the gates that are on, or their number and a digest where they are many.

    Never a number: the projector would take a column of numbers for a quantity and not for kinds.
    """
    on = np.flatnonzero(mask)
    if len(on) <= 8:
        return "gates " + " ".join(map(str, on)) if len(on) else "nothing"
    return f"{len(on)} gates, {hashlib.sha256(mask.tobytes()).hexdigest()[:6]}"


def write_projector(
    folder: Path, embeddings: NDArray[np.float32], rows: Sequence[tuple[str, ...]], masks: Bits
) -> None:
    """Write users for TensorBoard's projector, in the place of those that are there.

    Args:
        folder: The run.
        embeddings: (users, dim).
        rows: Name, split, most frequent mask and density of each.
        masks: The most frequent masks (users, G): equal ones have the same colour.
    """
    table = [("user", "users", "most frequent mask", "density"), *rows]
    place = folder / "projector"
    lines = ["\t".join(f"{number:.6g}" for number in row) for row in embeddings.tolist()]
    storage.write_text(place / "embeddings.tsv", "\n".join(lines) + "\n")
    storage.write_text(place / "users.tsv", "\n".join("\t".join(map(_one_line, row)) for row in table) + "\n")
    side = int(np.ceil(np.sqrt(len(masks))))
    tiles = np.zeros((side * side, 3), dtype=np.uint8)
    tiles[: len(masks)] = mask_colours(masks)
    sprite = tiles.reshape(side, side, 3).repeat(_TILE, 0).repeat(_TILE, 1)
    with storage.atomic_path(place / "masks.png") as temporary:
        Image.fromarray(sprite).save(temporary, format="PNG")
    config = ProjectorConfig()
    embedding = config.embeddings.add()
    embedding.tensor_name = "users"
    embedding.tensor_path, embedding.metadata_path = "projector/embeddings.tsv", "projector/users.tsv"
    embedding.sprite.image_path = "projector/masks.png"
    embedding.sprite.single_image_dim.extend([_TILE, _TILE])
    storage.write_text(folder / PROJECTOR_FILENAME, str(config))


_TILE = 16  # pixels


def mask_colours(masks: Bits) -> NDArray[np.uint8]:
    """A colour for each mask (rows, G), (rows, 3): twenty for the most frequent masks, grey for all others."""
    place, counts = np.unique(masks, axis=0, return_inverse=True, return_counts=True)[1:]
    rank = np.argsort(np.argsort(-counts, kind="stable"), kind="stable")
    palette = np.array([*matplotlib.color_sequences["tab20"], (0.75, 0.75, 0.75)])
    return (255 * palette[np.minimum(rank[place.ravel()], 20)]).round().astype(np.uint8)


class ExamplePanel:
    """A few fixed inputs of different users: what is known, the mask, and what comes of it."""

    def __init__(self, problem: Problem) -> None:
        """Choose the first input of users that are evenly spaced."""
        self._problem = problem
        first = np.unique(problem.user.numpy(), return_index=True)[1]
        chosen = np.linspace(0, len(first) - 1, min(EXAMPLES, len(first))).round().astype(int)
        self.inputs: NDArray[np.int64] = first[chosen].astype(np.int64)
        self._made: dict[tuple[int, bytes], dict[str, Any]] = {}

    def write(self, writer: SummaryWriter, step: int, masks: Bits, *, decode: bool) -> None:
        """Write the panel: text as ``examples``, pictures as ``examples/pictures``.

        Args:
            writer: Where to.
            step: Environment steps.
            masks: Decisions for all inputs (n, G).
            decode: Whether to add what the model makes of the inputs.
        """
        examples, pictures = [], []
        nothing = np.zeros(self._problem.gates, dtype=np.uint8)
        for index in self.inputs.tolist():
            mask = masks[index]
            loss, without = self._problem.losses(np.array([index, index]), np.stack([mask, nothing]))
            parts = self.describe(index)
            if decode and not isinstance(self._problem, PlantedProblem):
                parts |= {f"{name}, with the mask": part for name, part in self._outcome(index, mask).items()}
                parts |= {f"{name}, nothing on": part for name, part in self._outcome(index, nothing).items()}
            user = _user_name(self._problem, int(self._problem.user[index]))
            texts = {name: part for name, part in parts.items() if isinstance(part, str)}
            numbers = {"loss with the mask": f"{loss:.4g}", "loss, nothing on": f"{without:.4g}"}
            examples.append({"user": user, "mask": _bits(mask), **numbers, **texts})
            pictures.append({name: part for name, part in parts.items() if not isinstance(part, str)})
        writer.add_text("examples", markdown_table(examples), step)
        if pictures[0]:
            gallery = _gallery(pictures, [example["user"] for example in examples])
            writer.add_image("examples/pictures", gallery, step, dataformats="HWC")

    def describe(self, index: int) -> dict[str, Any]:
        """Parts of one input, text or pictures."""
        problem = self._problem
        if isinstance(problem, PlantedProblem):
            return {"best mask": _bits(problem.optimum(np.array([index]))[0])}
        parts: dict[str, Any] = problem.bundle.make_domain().describe(problem.bundle.examples, int(problem.rows[index]))
        return parts

    def _outcome(self, index: int, mask: Bits) -> dict[str, Any]:
        """What the model makes of an input under a mask (G,); computed once."""
        key = (index, mask.tobytes())
        if key not in self._made:
            assert not isinstance(self._problem, PlantedProblem)
            self._made[key] = self._problem.outcome(index, mask)
        return self._made[key]


def markdown_table(examples: list[dict[str, str]]) -> str:
    """A Markdown table with a column for each example, headed by its first entry, and a row for each further one."""
    lines = [[name, *(_escape(example[name]) for example in examples)] for name in examples[0]]
    lines.insert(1, ["---"] * (len(examples) + 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~])", r"\\\1", html.escape(_one_line(text), quote=False))


def _one_line(text: str) -> str:
    """Text without tabs and line breaks."""
    return " ".join(text.split())


def _bits(mask: Bits) -> str:
    """A mask as ones and zeros, or their number if it is long."""
    return "".join(map(str, mask)) if len(mask) <= GATES_SHOWN else f"{int(mask.sum())} of {len(mask)} on"


def _user_name(problem: Problem, user: int) -> str:
    return f"user-{user}" if isinstance(problem, PlantedProblem) else problem.bundle.users[user]


def _gallery(pictures: list[dict[str, Any]], names: list[str], *, size: int = 112) -> NDArray[np.uint8]:
    """Pictures of examples, one row each, with the names of rows and columns, (H, W, 3)."""
    columns = list(pictures[0])
    left = max(map(_text_width, names)) + 2 * _MARGIN
    width = max(size, *map(_text_width, columns)) + _MARGIN
    top = _FONT_SIZE + 2 * _MARGIN
    image = Image.new("RGB", (left + width * len(columns), top + (size + _MARGIN) * len(pictures)), "white")
    draw = ImageDraw.Draw(image)
    for column, name in enumerate(columns):
        draw.text((left + column * width, _MARGIN), name, "black", _font())
    for row, (parts, name) in enumerate(zip(pictures, names, strict=True)):
        y = top + row * (size + _MARGIN)
        draw.text((left - _MARGIN, y + size // 2), name, "black", _font(), anchor="rm")
        for column, key in enumerate(columns):
            picture = Image.fromarray(parts[key]).convert("RGB").resize((size, size), Image.Resampling.NEAREST)
            image.paste(picture, (left + column * width, y))
    return np.asarray(image).copy()
